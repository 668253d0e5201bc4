"""Artifact directories: written beside the final name and renamed, checked before anything is opened."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final

from memcompile.artifact.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from memcompile.errors import MemcompileError

if sys.platform != "win32":
    import fcntl

_BLOCK_BYTES: Final = 1 << 20
_FULL_DISK: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
# beside a file that is being written, hidden: the file so far, and a list of what is whole in it
UNFINISHED: Final = ".unfinished"
JOURNAL: Final = ".journal"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked artifact directory."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of a file the manifest names."""
        return _inside(self.path, name)


def open_artifact(path: str | os.PathLike[str], *, check_digests: bool = True) -> Artifact:
    """Read the manifest and check the directory against it: version, paths, sizes, digests, in that order.

    Nothing but the manifest is opened before all paths and sizes are right.
    Raises MC501, MC502, MC503, MC504, MC505, MC506.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    wanted = set(manifest.files)
    used = {function.file for function in manifest.functions.values()}
    used |= {function.kernel_file for function in manifest.functions.values() if function.kernel_file}
    if manifest.tokenizer is not None:
        used.add(manifest.tokenizer.file)
    for name in sorted(wanted | used):
        _inside(directory, name)
    where = str(directory / MANIFEST)
    for name in sorted(used - wanted):
        raise MemcompileError(
            "MC505", f"the manifest uses {name!r} but does not list it in files", where=where,
            fix="copy manifest.json again from where the artifact was made, or make the artifact again",
        )  # fmt: skip
    for name in sorted(_files(directory) - wanted - {MANIFEST}):
        raise MemcompileError(
            "MC505", f"the directory holds {name!r}, which the manifest does not list", where=where,
            fix=f"move {name} out of the artifact",
        )  # fmt: skip
    for name, entry in manifest.files.items():
        _check_size(directory, name, entry)
    if check_digests:
        for name, entry in manifest.files.items():
            _check_digest(directory, name, entry)
    return Artifact(directory, manifest)


def _inside(directory: Path, name: str) -> Path:
    """The path of `name` in the artifact, refused (MC504) if it leads or links out of it."""
    pure = PurePosixPath(name)
    bad = not pure.parts or "\0" in name or "\\" in name or pure.is_absolute() or ":" in pure.parts[0]
    if bad or ".." in pure.parts or str(pure) != name:
        raise _escape(directory, name, "it is not a plain relative path")
    path = directory
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise _escape(directory, name, f"{path.name} is a symbolic link")
    return path


def _escape(directory: Path, name: str, why: str) -> MemcompileError:
    return MemcompileError(
        "MC504", f"the manifest names the file {name!r}: {why}", where=str(directory / MANIFEST),
        fix="do not use this artifact; make it again from the model",
    )  # fmt: skip


def _files(directory: Path) -> set[str]:
    """Every file below `directory`; names that begin with a dot are other tools' notes and are left out."""
    found: set[str] = set()
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(folder).relative_to(directory)
        found.update((base / name).as_posix() for name in files if not name.startswith("."))
    return found


def _check_size(directory: Path, name: str, entry: FileEntry) -> None:
    path = directory / name
    try:
        status = path.lstat()
    except OSError as error:
        raise MemcompileError(
            "MC506", f"{name} is missing ({entry.bytes} bytes wanted)", where=str(path),
            fix="copy the whole directory again, or make the artifact again",
        ) from error  # fmt: skip
    if not stat.S_ISREG(status.st_mode):
        raise MemcompileError(
            "MC506", f"{name} is not a regular file", where=str(path),
            fix="put the file itself there: copy the whole directory again, or make the artifact again",
        )  # fmt: skip
    if status.st_size != entry.bytes:
        raise MemcompileError(
            "MC506", f"{name} has {status.st_size} bytes, the manifest says {entry.bytes}", where=str(path),
            fix="copy the whole directory again, or make the artifact again",
        )  # fmt: skip


def _check_digest(directory: Path, name: str, entry: FileEntry) -> None:
    got = sha256_of(directory / name)
    if got != entry.sha256:
        raise MemcompileError(
            "MC503",
            f"{name}: sha256 is {got}, the manifest says {entry.sha256}", where=str(directory / name),
            fix="copy the whole directory again, or make the artifact again",
        )  # fmt: skip


def sha256_of(path: Path) -> str:
    """The sha256 of a file in lower-case hexadecimal. Raises MC506 when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise MemcompileError(
            "MC506", f"{path.name} cannot be read: {error}", where=str(path),
            fix="allow reading the file, or copy the whole directory again",
        ) from error  # fmt: skip
    return digest.hexdigest()


class ArtifactWriter:
    """Write an artifact in a hidden directory beside its final name; rename it when it is complete.

    ```python
    with ArtifactWriter(out, force=False) as writer:
        ...                      # put files into writer.path
        writer.seal(manifest)    # digests + manifest.json: loadable at writer.path, may be repeated
        writer.commit()          # the rename
    ```

    Leaving the block without `commit` removes everything written. What a killed process left is removed
    by the next writer of the same name, which goes on with the weights that were being written. With
    `force` an existing artifact is exchanged in one step, so its name never stands for nothing.
    Raises MC508 (the name is taken) and MC509 (writing failed).
    """

    def __init__(self, target: str | os.PathLike[str], *, force: bool = False) -> None:
        self.target = Path(os.path.abspath(target))
        self.force = force
        self.path = self.target.parent / f".{self.target.name}.partial-{secrets.token_hex(6)}"
        self._lock: int | None = None
        self._digests: dict[tuple[str, int, int], str] = {}
        self._sealed = False

    def __enter__(self) -> ArtifactWriter:
        self._check_target()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
            self._lock = _lock(self.path)
            clean_stale(self.target, into=self.path)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            raise self._failed(error) from error

    def seal(self, manifest: Manifest) -> Manifest:
        """Digest every file written so far and write `manifest.json`; returns the manifest as written.

        Files that have not changed since the last seal are not read again. Raises MC504 for a link and
        MC509 when writing fails.
        """
        try:
            entries = {}
            for name in sorted(_files(self.path) - {MANIFEST}):
                path = _inside(self.path, name)
                status = path.stat()
                key = (name, status.st_size, status.st_mtime_ns)
                if key not in self._digests:
                    _flush(path)
                    self._digests[key] = sha256_of(path)
                entries[name] = FileEntry(self._digests[key], status.st_size)
            sealed = replace(manifest, files=entries)
            temporary = self.path / f".{MANIFEST}"
            temporary.write_text(sealed.as_json(), encoding="utf-8")
            _flush(temporary)
            temporary.rename(self.path / MANIFEST)
        except OSError as error:
            raise self._failed(error) from error
        self._sealed = True
        return sealed

    def commit(self) -> Path:
        """Check the sealed directory's names and sizes, then give it its final name, which is returned."""
        if not self._sealed:
            raise MemcompileError(
                "MC901", "an artifact was committed before it was sealed", where=str(self.path)
            )
        open_artifact(self.path, check_digests=False)
        self._check_target()
        try:
            _flush(self.path)
            if self.target.exists():
                _exchange(self.path, self.target)
            else:
                self.path.rename(self.target)
            _flush(self.target.parent)
        except OSError as error:
            raise self._failed(error) from error
        return self.target

    def _check_target(self) -> None:
        target = self.target
        if not os.path.lexists(target):
            return
        if not self.force:
            raise MemcompileError(
                "MC508", f"{target} exists already", where=str(target),
                fix="choose another output name, or replace it with --force",
            )  # fmt: skip
        empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
        if not empty and (target.is_symlink() or not (target / MANIFEST).is_file()):
            raise MemcompileError(
                "MC508", f"{target} exists and is not an artifact, so --force does not replace it",
                where=str(target), fix="choose another output name, or remove it yourself",
            )  # fmt: skip

    def _failed(self, error: OSError) -> MemcompileError:
        reason = error.strerror or str(error)
        return MemcompileError(
            "MC509", f"the artifact could not be written: {reason}", where=str(error.filename or self.path),
            fix="free space or choose another place; nothing was left behind",
        )  # fmt: skip


def clean_stale(target: Path, *, into: Path | None = None) -> list[Path]:
    """Remove what killed writers of `target` left; what one that still runs has locked stays.

    Unfinished files with a journal of what is whole in them are moved to the directory `into`.
    """
    removed = []
    for path in target.parent.glob(f".{_escaped(target.name)}.partial-*"):
        try:
            lock = _lock(path)
        except OSError:
            continue
        if into is not None:
            _salvage(path, into)
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        removed.append(path)
    return removed


def _salvage(old: Path, new: Path) -> None:
    for journal in sorted(old.glob(f".*{JOURNAL}")):
        unfinished = journal.with_name(journal.name.removesuffix(JOURNAL) + UNFINISHED)
        if unfinished.is_file() and not (new / unfinished.name).exists():
            unfinished.rename(new / unfinished.name)
            journal.rename(new / journal.name)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "[]*?" else letter for letter in name)


def _lock(path: Path) -> int | None:
    """Hold a directory for this process; the lock ends with the process however it ends."""
    if sys.platform == "win32":
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step where the system can, so `old` never stands for nothing."""
    if _renameat2(new, old):
        return
    with _set_aside(old):
        new.rename(old)


def _renameat2(new: Path, old: Path) -> bool:
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    return bool(call(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0)


@contextlib.contextmanager
def _set_aside(old: Path) -> Iterator[None]:
    aside = old.parent / f".{old.name}.replaced-{secrets.token_hex(6)}"
    old.rename(aside)
    try:
        yield
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
