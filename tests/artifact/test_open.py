"""Opening an artifact: version, paths, sizes, digests, and nothing outside the directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memcompile.artifact import open_artifact, store
from memcompile.errors import MemcompileError
from tests.artifact.sample import write_sample


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "out")


def refused(path: Path) -> MemcompileError:
    with pytest.raises(MemcompileError) as caught:
        open_artifact(path)
    assert caught.value.exit_code == 6
    return caught.value


def edit(path: Path, **changes: Any) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def test_a_good_artifact_opens(artifact: Path) -> None:
    opened = open_artifact(str(artifact))
    assert set(opened.manifest.files) == {"model.onnx", "tokenizer.json", "data/weights.bin"}
    assert opened.file("data/weights.bin").stat().st_size == 2560


def test_refuses_a_directory_that_is_not_there(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere")
    assert (error.code, "no such directory" in error.message) == ("MC501", True)


def test_refuses_a_directory_without_a_manifest(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert (error.code, "has no manifest.json" in error.message) == ("MC501", True)


def test_refuses_a_changed_file(artifact: Path) -> None:
    weights = artifact / "data" / "weights.bin"
    changed = bytearray(weights.read_bytes())
    changed[1000] ^= 1
    weights.write_bytes(changed)
    error = refused(artifact)
    assert error.code == "MC503"
    assert error.message.startswith("data/weights.bin: sha256 is ")
    assert open_artifact(artifact, check_digests=False).path == artifact


def test_refuses_a_truncated_file(artifact: Path) -> None:
    weights = artifact / "data" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    error = refused(artifact)
    assert (error.code, error.message) == (
        "MC506",
        "data/weights.bin has 2559 bytes, the manifest says 2560",
    )


def test_refuses_a_missing_file(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()
    error = refused(artifact)
    assert (error.code, error.message) == ("MC506", "model.onnx is missing (1100 bytes wanted)")


def test_refuses_a_declared_size_that_no_file_has(artifact: Path) -> None:
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    files["model.onnx"]["bytes"] = 2**49
    edit(artifact, files=files)
    error = refused(artifact)
    assert (error.code, error.message) == (
        "MC506",
        f"model.onnx has 1100 bytes, the manifest says {2**49}",
    )


def test_refuses_a_directory_in_place_of_a_file(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()
    (artifact / "model.onnx").mkdir()
    assert refused(artifact).message == "model.onnx is not a regular file"


def test_refuses_a_newer_version_though_its_files_are_gone(artifact: Path) -> None:
    edit(artifact, version=99)
    (artifact / "model.onnx").unlink()
    assert refused(artifact).code == "MC502"


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "data/../../secret", "data/./weights.bin", "a\\b", "c:/x", "", ".", "a//b"],
)
def test_refuses_a_path_that_leads_out(artifact: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact.parent / "secret").write_text("secret")
    edit(artifact, files={name: {"sha256": "0" * 64, "bytes": 6}})
    monkeypatch.setattr(store, "sha256_of", lambda path: pytest.fail(f"{path} was opened"))
    error = refused(artifact)
    assert error.code == "MC504"
    assert repr(name) in error.message


@pytest.mark.parametrize("function", ["../model.onnx", "/model.onnx"])
def test_refuses_a_graph_outside(artifact: Path, function: str) -> None:
    functions = json.loads((artifact / "manifest.json").read_text())["functions"]
    functions["step"]["file"] = function
    edit(artifact, functions=functions)
    assert refused(artifact).code == "MC504"


def test_refuses_a_file_that_is_a_link(artifact: Path) -> None:
    weights = artifact / "data" / "weights.bin"
    copy = artifact.parent / "weights.bin"
    weights.rename(copy)
    weights.symlink_to(copy)
    error = refused(artifact)
    assert (error.code, "weights.bin is a symbolic link" in error.message) == ("MC504", True)


def test_refuses_a_folder_that_is_a_link(artifact: Path) -> None:
    (artifact / "data").rename(artifact.parent / "data")
    (artifact / "data").symlink_to(artifact.parent / "data")
    assert refused(artifact).code == "MC504"


def test_refuses_a_graph_that_is_not_listed(artifact: Path) -> None:
    functions = json.loads((artifact / "manifest.json").read_text())["functions"]
    functions["step"]["file"] = "other.onnx"
    edit(artifact, functions=functions)
    error = refused(artifact)
    assert error.code == "MC505"
    assert error.message == "the manifest uses 'other.onnx' but does not list it in files"


def test_refuses_a_file_that_nobody_vouches_for(artifact: Path) -> None:
    (artifact / "model.onnx.data").write_text("")
    error = refused(artifact)
    assert error.code == "MC505"
    assert error.message == "the directory holds 'model.onnx.data', which the manifest does not list"


def test_hidden_notes_of_other_tools_are_left_alone(artifact: Path) -> None:
    (artifact / ".gitattributes").write_text("")
    (artifact / ".cache").mkdir()
    (artifact / ".cache" / "etag").write_text("")
    assert open_artifact(artifact).path == artifact


def test_refuses_a_manifest_that_is_not_text(artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refused(artifact).message


def test_refuses_a_manifest_too_large_to_read(artifact: Path) -> None:
    with (artifact / "manifest.json").open("wb") as file:
        file.truncate(2**27)
    error = refused(artifact)
    assert error.code == "MC505"
    assert "134217728 bytes, more than the 67108864 allowed" in error.message
