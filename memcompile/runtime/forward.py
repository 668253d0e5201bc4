"""Check the inputs of a function that carries no state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import FunctionEntry, TensorEntry
from memcompile.errors import MemcompileError


def check_feeds(entry: FunctionEntry, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The feeds as contiguous arrays, when their names, dtypes and sizes fit.

    A named size must be the same wherever it stands. Raises MC120 with what was given and what is needed.
    """
    names = [tensor.name for tensor in entry.inputs]
    wrong = [f"missing {name!r}" for name in names if name not in feeds]
    wrong += [f"unknown {name!r}" for name in feeds if name not in names]
    if wrong:
        raise _unfit(f"the inputs do not fit: {', '.join(wrong)}", entry)
    sizes: dict[str, tuple[int, str]] = {}
    checked = {}
    for tensor in entry.inputs:
        array = np.asarray(feeds[tensor.name])
        if array.dtype != np.dtype(tensor.dtype):
            raise _unfit(f"{tensor.name} is {array.dtype}, it must be {tensor.dtype}", entry)
        _check_dims(tensor, array, sizes, entry)
        checked[tensor.name] = np.ascontiguousarray(array)
    return checked


def _check_dims(
    tensor: TensorEntry, array: NDArray[Any], sizes: dict[str, tuple[int, str]], entry: FunctionEntry
) -> None:
    shape = "[" + ", ".join(str(dim) for dim in tensor.dims) + "]"
    if array.ndim != len(tensor.dims):
        raise _unfit(f"{tensor.name} has shape {list(array.shape)}, it must be {shape}", entry)
    for place, (dim, got) in enumerate(zip(tensor.dims, array.shape, strict=True)):
        if isinstance(dim, int):
            if dim != got:
                raise _unfit(
                    f"{tensor.name} has size {got} in dim {place}, it must be {dim} ({shape})", entry
                )
            continue
        known, source = sizes.setdefault(dim, (got, tensor.name))
        if known != got:
            raise _unfit(
                f"{tensor.name} has {dim} = {got} in dim {place}, but {source} has {dim} = {known}", entry
            )


def _unfit(message: str, entry: FunctionEntry) -> MemcompileError:
    inputs = "; ".join(f"{t.name} {t.dtype} [{', '.join(map(str, t.dims))}]" for t in entry.inputs)
    return MemcompileError("MC120", message, fix=f"the inputs are: {inputs}")
