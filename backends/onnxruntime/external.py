"""Move a model's large tensors into one file beside it, equal ones once, evaluated while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx._internal.exporter._core import TorchTensor, torch_dtype_to_onnx_dtype

from memcompile.weights.lazy import PIECE_BYTES, Held, LazyTensor
from memcompile.weights.parameter import stands_for
from memcompile.weights.write import write_tensors


class ExpressionTensor(ir.LazyTensor):
    """A tensor of the model that stands for an expression."""

    __slots__ = ("expression",)

    def __init__(self, expression: LazyTensor, name: str | None = None) -> None:
        super().__init__(
            lambda: TorchTensor(expression.evaluate(), name=name),
            dtype=torch_dtype_to_onnx_dtype(expression.dtype),
            shape=ir.Shape(expression.shape),
            name=name,
        )
        self.expression = expression


def name_expressions(model: ir.Model) -> None:
    """Let the model's stored tensors that were traced hollow stand for their expressions."""
    for value in model.graph.initializers.values():
        lazy = stands_for(getattr(value.const_value, "raw", None))
        if lazy is not None:
            value.const_value = ExpressionTensor(lazy.expression, value.name)


def externalize(model: ir.Model, folder: Path, name: str, from_bytes: int) -> None:
    """Write tensors of at least `from_bytes` bytes to `folder/name`, in pieces; the model refers to it.

    Tensors with the same bytes take the same place in the file, whatever their shapes: the embedding that a
    head shares is read in another shape, and what is read without being changed shares its memory too.
    """
    values = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= from_bytes
    ]
    if not values:
        return
    places = write_tensors(folder / name, [_expression(value.const_value) for value in values])
    for value, place in zip(values, places, strict=True):
        tensor = value.const_value
        assert tensor is not None
        assert value.name is not None
        value.const_value = ir.ExternalTensor(
            name,
            place.offset,
            place.length,
            tensor.dtype,
            shape=ir.Shape(list(tensor.shape.numpy())),
            name=value.name,
            base_dir=folder,
        )


def _expression(tensor: Any) -> LazyTensor:
    if isinstance(tensor, ExpressionTensor):
        return tensor.expression
    raw = getattr(tensor, "raw", None)
    return Held(raw) if isinstance(raw, torch.Tensor) else _Bytes(tensor)


@dataclass(frozen=True, eq=False)
class _Bytes(LazyTensor):
    """The bytes of a tensor of the model, as it stores them."""

    tensor: ir.TensorProtocol

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.nbytes,)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def read(self, begin: int, end: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.tensor.tobytes()), dtype=torch.uint8)[begin:end]

    def spans(self, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        del nbytes
        yield 0, self.rows
