"""Writing an artifact: whole under its final name, or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from memcompile.artifact import ArtifactWriter, open_artifact, store
from memcompile.errors import MemcompileError
from tests.artifact.sample import fill, sample_manifest, write_sample


def test_only_the_artifact_is_left(tmp_path: Path) -> None:
    assert write_sample(tmp_path / "a" / "out") == tmp_path / "a" / "out"
    assert os.listdir(tmp_path / "a") == ["out"]
    assert open_artifact(tmp_path / "a" / "out").manifest.states == sample_manifest().states


def test_a_relative_target_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sample(Path("out"))
    assert open_artifact("out").path == Path("out")


def test_nothing_is_left_when_it_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ArtifactWriter(tmp_path / "out") as writer:  # noqa: PT012
        fill(writer.path)
        writer.seal(sample_manifest())
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_sealed_directory_can_be_opened_before_it_has_its_name(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.path)
        writer.seal(sample_manifest())
        assert open_artifact(writer.path).manifest.files
        (writer.path / "report.json").write_text("{}")
        sealed = writer.seal(sample_manifest())
        assert "report.json" in sealed.files
        assert not (tmp_path / "out").exists()
        writer.commit()
    assert "report.json" in open_artifact(tmp_path / "out").manifest.files


def test_sealing_again_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = store.sha256_of
    monkeypatch.setattr(store, "sha256_of", lambda path: (read.append(path.name), digest(path))[1])
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.path)
        writer.seal(sample_manifest())
        (writer.path / "report.json").write_text("{}")
        writer.seal(sample_manifest())
    assert sorted(read) == ["model.onnx", "report.json", "tokenizer.json", "weights.bin"]


def test_refuses_to_commit_what_changed_after_the_seal(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC506"), ArtifactWriter(tmp_path / "out") as writer:  # noqa: PT012
        fill(writer.path)
        writer.seal(sample_manifest())
        (writer.path / "model.onnx").write_text("longer" * 1000)
        writer.commit()
    assert os.listdir(tmp_path) == []


def test_refuses_a_link_among_the_files(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC504"), ArtifactWriter(tmp_path / "out") as writer:  # noqa: PT012
        fill(writer.path)
        (writer.path / "link").symlink_to("/etc/passwd")
        writer.seal(sample_manifest())


def test_refuses_a_taken_name(tmp_path: Path) -> None:
    write_sample(tmp_path / "out")
    with pytest.raises(MemcompileError, match=r"MC508 .*out exists already") as caught:
        write_sample(tmp_path / "out")
    assert caught.value.exit_code == 2
    assert "--force" in str(caught.value.fix)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_replaces_artifacts_only(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    else:
        write_sample(tmp_path / "real")
        target.symlink_to(tmp_path / "real")
    with pytest.raises(MemcompileError, match=r"MC508 .* is not an artifact, so --force does not replace it"):
        write_sample(target, force=True)
    assert target.exists()


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_sample(tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_without_a_moment_of_neither(tmp_path: Path) -> None:
    target = write_sample(tmp_path / "out")
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not (target / "manifest.json").exists():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(30):
        write_sample(target, force=True)
    done.set()
    watcher.join()
    assert not missing
    assert os.listdir(tmp_path) == ["out"]


def test_where_names_cannot_be_exchanged_the_old_one_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_sample(tmp_path / "out")
    monkeypatch.setattr(store, "_renameat2", lambda new, old: False)
    write_sample(target, force=True)
    assert os.listdir(tmp_path) == ["out"]
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if to == target and ".partial-" in self.name:
            raise OSError(errno.EIO, "no", str(to))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(MemcompileError, match="MC509"):
        write_sample(target, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert open_artifact(target)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError) as caught, ArtifactWriter(tmp_path / "out") as writer:  # noqa: PT012
        fill(writer.path)
        raise OSError(errno.ENOSPC, "No space left on device", str(writer.path / "model.onnx"))
    assert caught.value.code == "MC509"
    assert caught.value.exit_code == 6
    assert "No space left on device" in caught.value.message
    assert str(caught.value.where).endswith("model.onnx")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_at_the_manifest_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_sample(tmp_path / "out")
    before = (target / "manifest.json").read_bytes()

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with pytest.raises(MemcompileError, match="MC509"), ArtifactWriter(target, force=True) as writer:  # noqa: PT012
        fill(writer.path)
        monkeypatch.setattr(Path, "write_text", full)
        writer.seal(sample_manifest())
    assert (target / "manifest.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MemcompileError, match="MC509 the artifact could not be written"):
        write_sample(tmp_path / "file" / "out")


KILLED = """
import os, signal, sys
from pathlib import Path
from memcompile.artifact import ArtifactWriter
from tests.artifact.sample import fill, sample_manifest

with ArtifactWriter(sys.argv[1]) as writer:
    fill(writer.path)
    writer.seal(sample_manifest())
    print("written", flush=True)
    signal.pause()
"""


def test_a_killed_writer_leaves_no_artifact_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "written\n"
        write_sample(tmp_path / "other")
        store.clean_stale(target)
        running = [name for name in os.listdir(tmp_path) if name.startswith(".out.partial-")]
        assert len(running) == 1, "what a running writer has locked stays"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not target.exists()
    assert running[0] in os.listdir(tmp_path)
    write_sample(target)
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


LIMITED = """
import resource, signal, sys
from memcompile.artifact import ArtifactWriter
from memcompile.errors import MemcompileError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ArtifactWriter(sys.argv[1]) as writer:
        (writer.path / "weights.bin").write_bytes(bytes(200_000))
except MemcompileError as error:
    print(error.code, error.message)
"""


def test_a_file_that_the_system_cuts_off_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "MC509 the artifact could not be written: File too large\n"
    assert os.listdir(tmp_path) == []
