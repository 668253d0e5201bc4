"""Write expressions into one file, piece by piece, equal tensors once; a write that was killed goes on.

While a piece is digested and written, the next one is computed. A journal beside the unfinished file says
which tensors are whole; `ArtifactWriter` carries both into the directory of the next attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch

from memcompile.artifact.store import JOURNAL, UNFINISHED
from memcompile.weights.lazy import PIECE_BYTES, LazyTensor, Reshape, forget_parts

# pieces that are computed before they can be written
_AHEAD: Final = 2
_MIB: Final = 1 << 20

_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are in the file."""

    offset: int
    length: int


@contextlib.contextmanager
def watched(update: Callable[[int, int], None]) -> Iterator[None]:
    """Tell `update` how many MiB of how many are written, while files are written inside."""
    token = _watcher.set(update)
    try:
        yield
    finally:
        _watcher.reset(token)


def write_tensors(path: Path, tensors: Sequence[LazyTensor]) -> list[Place]:
    """Write the tensors' bytes to `path`, one after another; gives the place of each.

    Equal expressions are evaluated and stored once, and so are tensors whose bytes turn out to be equal. The
    file appears under its name when it is complete.
    """
    unfinished, journal = _beside(path)
    same = [_bytes_of(tensor) for tensor in tensors]
    distinct = list(dict.fromkeys(same))
    total = sum(tensor.nbytes for tensor in distinct)
    tell = _watcher.get() or (lambda done, total: None)
    places: dict[LazyTensor, Place] = {}
    stored: dict[str, Place] = {}
    with unfinished.open("r+b" if unfinished.exists() else "w+b") as file, journal.open("a+") as notes:
        done = 0
        waiting = distinct
        for tensor, place, digest in _resumed(file, notes, distinct):
            places[tensor] = stored[digest] = place
            waiting = waiting[1:]
            done += tensor.nbytes
        file.seek(end := max((p.offset + p.length for p in places.values()), default=0))
        file.truncate()
        for tensor, pieces in _computed(waiting):
            summed = hashlib.sha256()
            for piece in pieces:
                data = piece.reshape(-1).view(torch.uint8).numpy().data if piece.numel() else b""
                summed.update(data)
                file.write(data)
                done += len(data)
                tell(done // _MIB, max(1, total // _MIB))
            name = f"{summed.hexdigest()} {tensor.nbytes}"
            if name in stored:
                file.seek(end)
                file.truncate()
            else:
                stored[name] = Place(end, tensor.nbytes)
                end += tensor.nbytes
            places[tensor] = place = stored[name]
            file.flush()
            _note(notes, tensor, place, name)
        os.fsync(file.fileno())
    forget_parts()
    unfinished.rename(path)
    journal.unlink()
    return [places[tensor] for tensor in same]


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}{UNFINISHED}"), path.with_name(f".{path.name}{JOURNAL}")


def _bytes_of(tensor: LazyTensor) -> LazyTensor:
    """The expression that has the tensor's bytes, whatever their shape."""
    while isinstance(tensor, Reshape):
        tensor = tensor.source
    return tensor


def _computed(tensors: Sequence[LazyTensor]) -> Iterator[tuple[LazyTensor, Iterator[torch.Tensor]]]:
    """Each tensor with its pieces, which another thread computes in order, a few ahead."""
    spans = ((tensor, span) for tensor in tensors for span in tensor.spans(PIECE_BYTES))
    queue: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:

        def fill() -> None:
            while len(queue) < _AHEAD:
                following = next(spans, None)
                if following is None:
                    return
                tensor, (begin, end) = following
                queue.append(pool.submit(tensor.read, begin, end))

        def pieces(tensor: LazyTensor) -> Iterator[torch.Tensor]:
            for _ in tensor.spans(PIECE_BYTES):
                fill()
                piece = queue.popleft().result()
                fill()
                yield piece.contiguous()

        try:
            for tensor in tensors:
                yield tensor, pieces(tensor)
        finally:
            for future in queue:
                future.cancel()


def _note(notes: IO[str], tensor: LazyTensor, place: Place, digest: str) -> None:
    line = {"tensor": tensor.digest(), "offset": place.offset, "length": place.length, "sha256": digest}
    notes.write(json.dumps(line) + "\n")
    notes.flush()


def _resumed(
    file: IO[bytes], notes: IO[str], tensors: Sequence[LazyTensor]
) -> list[tuple[LazyTensor, Place, str]]:
    """The first tensors that an earlier attempt wrote whole; their bytes are checked against the journal."""
    notes.seek(0)
    found: list[tuple[LazyTensor, Place, str]] = []
    for tensor, text in zip(tensors, notes.read().splitlines(), strict=False):
        try:
            line: dict[str, Any] = json.loads(text)
            place = Place(int(line["offset"]), int(line["length"]))
            wanted = str(line["sha256"])
        except (ValueError, KeyError, TypeError):
            break
        if line.get("tensor") != tensor.digest() or place.length != tensor.nbytes:
            break
        if f"{_sha256(file, place)} {place.length}" != wanted:
            break
        found.append((tensor, place, wanted))
    notes.seek(0)
    notes.truncate()
    for tensor, place, digest in found:
        _note(notes, tensor, place, digest)
    return found


def _sha256(file: IO[bytes], place: Place) -> str:
    digest = hashlib.sha256()
    file.seek(place.offset)
    left = place.length
    while left and (block := file.read(min(left, _MIB))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()
