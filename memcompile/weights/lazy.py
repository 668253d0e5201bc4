"""Weights as expressions over tensors on disk, evaluated a few rows at a time.

An expression is a frozen value: two that are equal stand for the same numbers, which is how tied and forked
weights are stored once. Rows (axis 0) are the unit of evaluation, so that a tensor of gigabytes can be cast,
quantised and written without ever being in memory as a whole.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

# what is read, computed and written at a time
PIECE_BYTES: Final = 64 << 20
# one read of the system takes less than 2 GiB
_READ_BYTES: Final = 1 << 30


class LazyTensor(ABC):
    """A tensor that is computed when it is asked for; subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def read(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end`, contiguous; a tensor without axes counts as one row."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def evaluate(self) -> torch.Tensor:
        """The whole tensor."""
        if self.nbytes <= PIECE_BYTES:
            return self.read(0, self.rows)
        whole = torch.empty(self.shape, dtype=self.dtype)
        begin = 0
        for piece in self.pieces():
            whole[begin : begin + len(piece)] = piece
            begin += len(piece)
        return whole

    def pieces(self, nbytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The tensor in parts of about `nbytes` bytes, at least a row each."""
        for begin, end in self.spans(nbytes):
            yield self.read(begin, end)

    def spans(self, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        """The rows of each part of `pieces`."""
        step = max(1, nbytes * self.rows // max(1, self.nbytes))
        for begin in range(0, self.rows, step):
            yield begin, min(begin + step, self.rows)

    def digest(self) -> str:
        """Of the expression, not of its values: equal ones mean equal values, in any process."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class Stored(LazyTensor):
    """Bytes of a file, row-major. `version` tells the file from others that had its name."""

    path: str
    offset: int
    stored_shape: tuple[int, ...]
    stored_dtype: torch.dtype
    version: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored_dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        if not row * (end - begin):
            return torch.empty(shape, dtype=self.dtype)
        data = read_bytes(self.path, self.offset + begin * row, (end - begin) * row)
        return torch.frombuffer(data, dtype=self.dtype).reshape(shape)


def read_bytes(path: str, offset: int, count: int) -> bytearray:
    """Bytes of a file, read and not mapped: mapped pages would count as this process's memory."""
    data = bytearray(count)
    view = memoryview(data)
    handle = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < count:
            got = os.preadv(handle, [view[done : done + _READ_BYTES]], offset + done)
            if not got:
                raise OSError(f"{path} ends after {offset + done} bytes, {offset + count} are wanted")
            done += got
    finally:
        os.close(handle)
    return data


def version_of(path: str) -> str:
    """Size and time of change: what tells a file from another one of its name."""
    status = os.stat(path)
    return f"{status.st_size}.{status.st_mtime_ns}"


@dataclass(frozen=True)
class Cast(LazyTensor):
    """The source in another type."""

    source: LazyTensor
    to: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.to

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self.source.read(begin, end).to(self.to)


@dataclass(frozen=True)
class Narrow(LazyTensor):
    """`length` entries of the source along `axis`, from `start`."""

    source: LazyTensor
    axis: int
    start: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source.shape
        return (*shape[: self.axis], self.length, *shape[self.axis + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        if self.axis == 0:
            return self.source.read(self.start + begin, self.start + end)
        return self.source.read(begin, end).narrow(self.axis, self.start, self.length).contiguous()


@dataclass(frozen=True)
class Take(LazyTensor):
    """Rows of the source in the order of `index`."""

    source: LazyTensor
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        wanted = self.index[begin:end]
        if not wanted:
            return self.source.read(0, 0)
        first, last = min(wanted), max(wanted) + 1
        return self.source.read(first, last)[torch.tensor(wanted) - first]


@dataclass(frozen=True)
class Concat(LazyTensor):
    """Sources one after another along `axis`."""

    sources: tuple[LazyTensor, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.sources[0].shape
        total = sum(source.shape[self.axis] for source in self.sources)
        return (*shape[: self.axis], total, *shape[self.axis + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        if self.axis:
            return torch.cat([source.read(begin, end) for source in self.sources], self.axis)
        parts, start = [], 0
        for source in self.sources:
            first, last = max(begin - start, 0), min(end - start, source.rows)
            if first < last:
                parts.append(source.read(first, last))
            start += source.rows
        return torch.cat(parts) if len(parts) != 1 else parts[0]


@dataclass(frozen=True)
class Transpose(LazyTensor):
    """The source [N,K] as [K,N]."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        rows, width = self.source.shape
        return (width, rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        columns = torch.empty((end - begin, self.source.rows), dtype=self.dtype)
        start = 0
        for piece in self.source.pieces():
            columns[:, start : start + len(piece)] = piece[:, begin:end].t()
            start += len(piece)
        return columns

    def spans(self, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        # every part reads the whole source: few, large ones
        yield from super().spans(max(nbytes, self.nbytes // 4))


@dataclass(frozen=True)
class Reshape(LazyTensor):
    """The source's numbers in another shape."""

    source: LazyTensor
    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        mine, theirs = math.prod(self.to[1:]), math.prod(self.source.shape[1:])
        shape = (end - begin, *self.to[1:]) if self.to else ()
        first, last = begin * mine, end * mine
        if first == last:
            return torch.empty(shape, dtype=self.dtype)
        start = first // theirs
        flat = self.source.read(start, -(-last // theirs)).reshape(-1)
        return flat[first - start * theirs : last - start * theirs].reshape(shape)


@dataclass(frozen=True)
class Mapped(LazyTensor):
    """What `function` makes of the whole source; `function` must be a value (a frozen dataclass, a function
    of a module) for equal expressions to be equal."""

    source: LazyTensor
    function: Callable[[torch.Tensor], torch.Tensor]
    to_shape: tuple[int, ...]
    to_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.to_dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        whole = self.function(self.source.evaluate()).to(self.to_dtype).reshape(self.to_shape)
        return whole[begin:end].contiguous() if self.to_shape else whole

    def spans(self, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        del nbytes
        yield 0, self.rows


@dataclass(frozen=True, eq=False, repr=False)
class Held(LazyTensor):
    """A tensor that is in memory; equal only to itself."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        value = self.tensor.detach().cpu()
        return value[begin:end].contiguous() if value.ndim else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    def __repr__(self) -> str:
        value = self.tensor.detach().cpu().contiguous().reshape(-1)
        digest = hashlib.sha256(value.view(torch.uint8).numpy().data if value.numel() else b"")
        return f"Held({self.shape}, {self.dtype}, {digest.hexdigest()})"


class Producer(Protocol):
    """A computation that gives several tensors at once; a value, as expressions are."""

    def produce(self) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Part(LazyTensor):
    """One of a producer's tensors. What the last producer gave is kept until another one is asked."""

    producer: Producer
    name: str
    part_shape: tuple[int, ...]
    part_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.part_dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        part = _LAST.of(self.producer)[self.name]
        assert tuple(part.shape) == self.part_shape, (self.name, part.shape, self.part_shape)
        return part[begin:end].contiguous()


class _Last:
    """The tensors of the producer that was asked last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._producer: Producer | None = None
        self._parts: Mapping[str, torch.Tensor] = {}

    def of(self, producer: Producer) -> Mapping[str, torch.Tensor]:
        with self._lock:
            if producer != self._producer:
                self._producer, self._parts = None, {}
                self._parts = producer.produce()
                self._producer = producer
            return self._parts

    def forget(self) -> None:
        with self._lock:
            self._producer, self._parts = None, {}


_LAST: Final = _Last()


def forget_parts() -> None:
    """Let go of what the last producer gave."""
    _LAST.forget()
