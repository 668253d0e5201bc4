"""What is in the wheel is what is in the folders, and it works where nothing else is installed."""

from __future__ import annotations

import email
import email.message
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

FOLDERS = {"memcompile": "memcompile", "passes": "memcompile/passes", "backends": "memcompile/backends"}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without leaving files in it."""
    return build(repository, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_folders_and_each_file_once(wheel: Path, repository: Path) -> None:
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(packed) == len(set(packed))
    assert set(packed) == wanted(repository)


def test_the_wheel_carries_licence_readme_and_command(wheel: Path, repository: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name.split(".dist-info/")[-1]: name for name in archive.namelist()}
    assert archive.read(names["licenses/LICENSE"]) == (repository / "LICENSE").read_bytes()
    assert b"memcompile = memcompile.cli:main" in archive.read(names["entry_points.txt"])
    assert (repository / "README.md").read_text(encoding="utf-8").strip() in metadata_of(wheel).get_payload()


def test_the_extras_are_the_documented_ones_and_the_core_does_not_include_torch(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    extras = {"compile", "cpu", "dev", "gpu", "rivals", "triton", "tvm"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert core
    heavy = ("torch", "transformers", "onnx", "accelerate", "tvm")
    assert [line for line in core if line.startswith(heavy)] == []


def test_an_sdist_without_the_links_builds_the_same_wheel(
    wheel: Path, repository: Path, tmp_path: Path
) -> None:
    sdist = build(repository, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "memcompile" / "passes").exists()
    again = build(unpacked, "wheel", tmp_path / "again")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_torch_is_pinned_once_and_exactly(repository: Path) -> None:
    pins = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0"]


@pytest.mark.slow
def test_a_plain_install_shows_its_help_without_torch(wheel: Path, repository: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    run([*pip, "-c", repository / "constraints.txt", wheel], tmp_path)
    assert "optimize" in run([python.with_name("memcompile"), "--help"], tmp_path)
    assert "memcompile" in run([python, "-m", "memcompile", "--version"], tmp_path)
    installed = run([python, "-m", "pip", "list", "--format=freeze"], tmp_path)
    assert "torch==" not in installed
    place = run([python, "-c", "import memcompile.plan as m; print(m.__file__)"], tmp_path)
    assert Path(place.strip()).is_relative_to(tmp_path / "venv")


def metadata_of(wheel: Path) -> email.message.Message:
    """The wheel's METADATA; its payload is the README."""
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(archive.read(name).decode("utf-8"))


def wanted(repository: Path) -> set[str]:
    """The files of the package by their path in the wheel."""
    links = {repository / "memcompile" / "passes", repository / "memcompile" / "backends"}
    return {
        f"{inside}/{path.relative_to(repository / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (repository / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not links & set(path.parents)
    }


def build(source: Path, kind: str, into: Path) -> Path:
    """Build a wheel or an sdist of `source` with the tools of this environment; returns the file."""
    # in a copy: setuptools leaves build/ and *.egg-info beside setup.py
    copy = into / "source"
    copy.mkdir(parents=True)
    for name in ("memcompile", "passes", "backends", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        run(["cp", "-a", source / name, copy], into)
    run([sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", into, copy], into)
    return next(path for path in into.iterdir() if path.is_file())


def run(command: list[str | Path], folder: Path) -> str:
    """Run a command in `folder`, away from the checkout's own packages; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
