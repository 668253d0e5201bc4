"""Weights of a TVM artifact: a safetensors file, mapped into memory, each tensor aligned for vector loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memcompile.errors import MemcompileError
from memcompile.runtime.buffers import ALIGNMENT_BYTES, aligned_zeros

Array = NDArray[Any]
DTYPES: Final = {
    "F32": "float32", "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LENGTH_BYTES: Final = 8
_HEADER_LIMIT: Final = 64 * 2**20


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and for each function the names of those it takes after its inputs."""

    tensors: dict[str, Array]
    order: dict[str, tuple[str, ...]]

    def of(self, function: str) -> list[Array]:
        """The weights of a function, in call order."""
        return [self.tensors[name] for name in self.order.get(function, ())]


def open_weights(path: Path) -> Weights:
    """Map a safetensors file whose metadata lists, for each function, its tensors.

    Pages come from the file when they are first read. Raises MC505 for a file that is not one.
    """
    try:
        return _open(path)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise MemcompileError(
            "MC505", f"{path.name} is not a weights file: {error}", where=str(path),
            fix="copy the whole directory again, or make the artifact again",
        ) from error  # fmt: skip


def _open(path: Path) -> Weights:
    # copies are made of pages that are written, and nothing writes: the mapping must only look writable
    memory: NDArray[np.uint8] = np.memmap(path, np.uint8, "c")
    length = int.from_bytes(memory[:_LENGTH_BYTES].tobytes(), "little")
    if not 0 < length <= min(_HEADER_LIMIT, len(memory) - _LENGTH_BYTES):
        raise ValueError(f"a header of {length} bytes does not fit")
    start = _LENGTH_BYTES + length
    header = json.loads(memory[_LENGTH_BYTES:start].tobytes().decode("utf-8"))
    order = {name: tuple(json.loads(names)) for name, names in header.pop("__metadata__", {}).items()}
    tensors = {name: _tensor(memory[start:], name, entry) for name, entry in header.items()}
    missing = sorted({name for names in order.values() for name in names} - set(tensors))
    if missing:
        raise ValueError(f"it lists {missing[0]!r} for a function but does not hold it")
    return Weights(tensors, order)


def _tensor(data: NDArray[np.uint8], name: str, entry: Any) -> Array:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    size = prod(shape) * np.dtype(dtype).itemsize
    if not 0 <= begin <= end <= len(data) or end - begin != size:
        raise ValueError(f"{name} has {end - begin} bytes from {begin}, {size} are wanted of {len(data)}")
    mapped = data[begin:end]
    if mapped.ctypes.data % ALIGNMENT_BYTES == 0:
        return mapped.view(dtype).reshape(shape)
    aligned = aligned_zeros(shape, dtype)
    aligned.reshape(-1).view(np.uint8)[:] = mapped
    return aligned
