"""Memory that a session binds as input and output of the same call, so that a cache is never copied.

ONNX Runtime is imported when a buffer is bound to it or lies on its device: other backends do without.
"""

from __future__ import annotations

from math import prod
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# what vector loads of compiled kernels may take for granted
ALIGNMENT_BYTES: Final = 64
# numpy has no bfloat16, and no tensor of ours is uint16: arrays of it hold bfloat16's bits
_BFLOAT16: Final = {"bfloat16": "uint16"}
_ONNX_BFLOAT16: Final = 16


def aligned_zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros that begin at a multiple of 64 bytes, of bfloat16 as uint16; pages are real only once written."""
    dtype = _BFLOAT16.get(dtype, dtype)
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


def host_value(array: Array) -> Any:
    """An ONNX Runtime value over an array's memory, which must outlive it; uint16 is bfloat16."""
    import onnxruntime as ort

    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


class Buffer(Protocol):
    """A tensor [batch, heads, slots, width] that stays where it is between calls."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def bind(self, binding: Any, name_in: str | None, name_out: str | None, row: int | None) -> None:
        """Bind all rows, or one row as a batch of one, as input and as output."""

    def row(self, row: int) -> Array:
        """One row [heads, slots, width] on the host; on the CPU a view."""

    def move(self, row: int, slots: NDArray[np.int64]) -> None:
        """Put the tokens of `slots` into the first slots of the row, in that order."""

    def resized(self, slots: int, used: int) -> Buffer:
        """A new buffer with the first `used` slots of every row."""

    def store(self, row: int, values: Array) -> None:
        """Write [heads, n, width] to the first n slots of a row."""


class HostBuffer:
    """A buffer in this process's memory."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str) -> None:
        # zeros: an empty slot that a mask hides must not hold a NaN
        self.array = aligned_zeros(shape, dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def bind(self, binding: Any, name_in: str | None, name_out: str | None, row: int | None) -> None:
        value = host_value(self.array if row is None else self.array[row : row + 1])
        if name_in is not None:
            binding.bind_ortvalue_input(name_in, value)
        if name_out is not None:
            binding.bind_ortvalue_output(name_out, value)

    def row(self, row: int) -> Array:
        view: Array = self.array[row]
        return view

    def move(self, row: int, slots: NDArray[np.int64]) -> None:
        _move(self.array[row], slots)

    def resized(self, slots: int, used: int) -> HostBuffer:
        batch, heads, _, width = self.shape
        new = HostBuffer((batch, heads, slots, width), str(self.array.dtype))
        new.array[:, :, :used] = self.array[:, :, :used]
        return new

    def store(self, row: int, values: Array) -> None:
        self.array[row, :, : values.shape[1]] = values


class DeviceBuffer:
    """A buffer in a device's memory; rows are bound by address, compaction goes through the host."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, device: str) -> None:
        import onnxruntime as ort

        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._device = device
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), self._dtype.type, device, 0)
        if self.nbytes:
            self._value.update_inplace(np.zeros(shape, self._dtype))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def bind(self, binding: Any, name_in: str | None, name_out: str | None, row: int | None) -> None:
        shape, address = list(self._shape), int(self._value.data_ptr())
        if row is not None:
            address += row * (self.nbytes // shape[0])
            shape[0] = 1
        if name_in is not None:
            binding.bind_input(name_in, self._device, 0, self._dtype.type, shape, address)
        if name_out is not None:
            binding.bind_output(name_out, self._device, 0, self._dtype.type, shape, address)

    def row(self, row: int) -> Array:
        values: Array = self._value.numpy()[row]
        return values

    def move(self, row: int, slots: NDArray[np.int64]) -> None:
        values = self._value.numpy().copy()
        _move(values[row], slots)
        self._value.update_inplace(values)

    def resized(self, slots: int, used: int) -> DeviceBuffer:
        batch, heads, _, width = self._shape
        new = DeviceBuffer((batch, heads, slots, width), str(self._dtype), self._device)
        values = np.zeros(new.shape, self._dtype)
        values[:, :, :used] = self._value.numpy()[:, :, :used]
        new._value.update_inplace(values)
        return new

    def store(self, row: int, values: Array) -> None:
        everything = self._value.numpy().copy()
        everything[row, :, : values.shape[1]] = values
        self._value.update_inplace(everything)


def _move(tokens_GSD: Array, slots: NDArray[np.int64]) -> None:
    moved = slots != np.arange(len(slots))
    if not moved.any():
        return
    start = int(moved.argmax())
    rest = slots[start:]
    if rest[-1] - rest[0] == len(rest) - 1:
        # one run, the usual case of sinks and a window: flat, numpy moves overlapping memory without a copy
        width = tokens_GSD.shape[2]
        for head in tokens_GSD.reshape(len(tokens_GSD), -1):
            head[start * width : len(slots) * width] = head[rest[0] * width : (rest[-1] + 1) * width]
    else:
        tokens_GSD[:, start : len(slots)] = tokens_GSD[:, rest]


def new_buffer(shape: tuple[int, int, int, int], dtype: str, device: str) -> Buffer:
    """A zeroed buffer where the session computes."""
    return HostBuffer(shape, dtype) if device == "cpu" else DeviceBuffer(shape, dtype, device)
