"""Converters of torch operators that TVM's importer lacks, or has for fixed sizes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import tvm
from torch import fx
from tvm import relax

Importer = Any  # tvm.relax.frontend.torch's importer class, which it does not export


def topk(node: fx.Node, importer: Importer) -> Any:
    """A whole sort and its beginning: TVM's own takes no symbolic count."""
    x, count, *rest = importer.retrieve_args(node)
    axis = (rest[0] if rest else -1) % len(x.ty.shape)
    largest = rest[1] if len(rest) > 1 else True
    builder = importer.block_builder
    order = builder.emit(relax.op.argsort(x, axis=axis, descending=largest, dtype="int64"))
    chosen = builder.emit(relax.op.strided_slice(order, [axis], [0], [count], assume_inbound=True))
    values = builder.emit(relax.op.gather_elements(x, chosen, axis=axis))
    return builder.emit(relax.Tuple([values, chosen]))


def amax(node: fx.Node, importer: Importer) -> Any:
    """The greatest along axes."""
    x, axes, *keep = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.max(x, axis=list(axes), keepdims=bool(keep and keep[0])))


def max_dim(node: fx.Node, importer: Importer) -> Any:
    """The greatest along an axis and its place: TVM's own sorts the axis for it."""
    x, axis, *keep = importer.retrieve_args(node)
    kept = bool(keep and keep[0])
    builder = importer.block_builder
    values = builder.emit(relax.op.max(x, axis=[axis], keepdims=kept))
    places = builder.emit(relax.op.argmax(x, axis=axis, keepdims=kept))
    return builder.emit(relax.Tuple([values, places]))


def slice_tensor(node: fx.Node, importer: Importer) -> Any:
    """A slice that ends at a symbolic size has that size; TVM's own leaves it unknown."""
    x, axis, start, end, *step = (*importer.retrieve_args(node), None, None, None)[:5]
    if end is None or isinstance(end, int | tvm.tirx.IntImm):
        return importer._slice(node)
    bounds = [start if start is not None else 0], [end], [step[0] or 1]
    return importer.block_builder.emit(relax.op.strided_slice(x, [axis or 0], *bounds, assume_inbound=True))


def arange(node: fx.Node, importer: Importer) -> Any:
    """A range that counts down: TVM gives it a wrong length."""
    arguments = importer.retrieve_args(node)
    step = arguments[2] if len(arguments) > 2 else 1
    if not isinstance(step, int) or step > 0:
        return importer._arange(node)
    start, end, _ = arguments
    count = tvm.tirx.max((start - end - step - 1) // -step, 0)
    builder = importer.block_builder
    up = builder.emit(relax.op.arange(0, count, 1, dtype="int64"))
    down = builder.emit(relax.op.multiply(up, relax.const(step, "int64")))
    return builder.emit(relax.op.add(down, relax.const(start, "int64")))


def divide(node: fx.Node, importer: Importer) -> Any:
    """A quotient rounded down: TVM's own takes an integer for 32 bits wide."""
    x, divisor, *_ = importer.retrieve_args(node)
    if node.kwargs.get("rounding_mode") != "floor" or not isinstance(divisor, int):
        return importer._div(node)
    divided = relax.op.floor_divide(x, relax.const(divisor, x.ty.dtype.dtype))
    return importer.block_builder.emit(divided)


def clamp(node: fx.Node, importer: Importer) -> Any:
    """Bounds of numbers: TVM's own casts a missing bound, infinity, to the tensor's type."""
    x, low, high = (*importer.retrieve_args(node), None, None)[:3]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    builder = importer.block_builder
    for bound, operator in ((low, relax.op.maximum), (high, relax.op.minimum)):
        if bound is not None:
            x = builder.emit(operator(x, relax.const(bound, x.ty.dtype.dtype)))
    return x


def embedding(node: fx.Node, importer: Importer) -> Any:
    """Rows of a table; an index out of range takes the nearest, where TVM's own reads what is not its."""
    table, indices = importer.retrieve_args(node)[:2]
    builder = importer.block_builder
    shape = list(indices.ty.shape)
    flat = builder.emit(relax.op.reshape(indices, (-1,)))
    rows = builder.emit(relax.op.take(table, flat, axis=0, mode="clip"))
    return builder.emit(relax.op.reshape(rows, (*shape, table.ty.shape[1])))


def sym_min(node: fx.Node, importer: Importer) -> Any:
    """The smaller of two sizes."""
    one, other = importer.retrieve_args(node)
    return tvm.tirx.min(one, other)


CORRECTED: Final[dict[str, Callable[[fx.Node, Importer], Any]]] = {
    "topk.default": topk,
    "amax.default": amax,
    "max.dim": max_dim,
    "slice.Tensor": slice_tensor,
    "arange.start_step": arange,
    "div.Tensor_mode": divide,
    "clamp.default": clamp,
    "embedding.default": embedding,
    "sym_min": sym_min,
}
