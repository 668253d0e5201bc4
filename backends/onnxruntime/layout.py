"""Heads packed into the model axis, [B,T,H*D], as ONNX Runtime's fused operators want them.

Graphs split heads and transpose before attention, and do the reverse after it. These helpers look through
both, so that neither a transpose nor a copy is left between the projections and the fused operator.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import Emitter, lowers

aten: Any = torch.ops.aten
_SAME_VALUES = (aten.contiguous.default, aten.clone.default, aten.alias.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SPLIT_TRANSPOSE = ((1, 2), (2, 1), (-3, -2), (-2, -3))


def through_copies(node: Any) -> Any:
    """The node whose values `node` merely repeats."""
    while isinstance(node, fx.Node):
        if node.target in _SAME_VALUES:
            node = node.args[0]
        elif node.target is aten.cat.default and len(parts := _not_empty(node)) == 1:
            node = parts[0]
        else:
            break
    return node


def _not_empty(concatenation: fx.Node) -> list[Any]:
    # a rotary embedding of all channels is written as the rotated ones and the none that are left
    parts: Any = concatenation.args[0]
    shapes = [getattr(part.meta.get("val"), "shape", ()) for part in parts]
    return [
        p
        for p, shape in zip(parts, shapes, strict=True)
        if not any(isinstance(d, int) and d == 0 for d in shape)
    ]


def is_head_transpose(node: Any) -> bool:
    """Whether `node` swaps the head and token axes of a four-dimensional tensor."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.transpose.int:
        return tuple(node.args[1:3]) in _SPLIT_TRANSPOSE
    return node.target is aten.permute.default and tuple(node.args[1]) == (0, 2, 1, 3)  # type: ignore[arg-type]


def pack_heads(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """The value of `node`, [B,H,T,D], as [B,T,H*D]."""
    node = through_copies(node)
    key = ("packed", node)
    if key not in emitter.memo:
        emitter.memo[key] = _pack(emitter, node)
    packed: torch.Tensor = emitter.memo[key]
    return packed


def _pack(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    batch, heads, tokens, width = emitter.value(node).shape
    if is_head_transpose(node):
        split = through_copies(node.args[0])
        if isinstance(split, fx.Node) and split.target in _RESHAPES:
            source = emitter.value(split.args[0])
            if source.ndim == 3 and source.shape[2] == heads * width:
                whole: torch.Tensor = source
                return whole
        joined: torch.Tensor = emitter.value(split).reshape(batch, tokens, heads * width)
        return joined
    moved: torch.Tensor = emitter.value(node).transpose(1, 2).reshape(batch, tokens, heads * width)
    return moved


def remember_packed(emitter: Emitter, node: fx.Node, packed: torch.Tensor) -> None:
    """Note that `packed` [B,T,H*D] holds the values of `node` [B,H,T,D]."""
    emitter.memo["packed", node] = packed


def _packed_output(emitter: Emitter, node: Any) -> torch.Tensor | None:
    """[B,T,H*D], when `node` [B,T,H,D] is the transposed output of a fused operator."""
    node = through_copies(node)
    if not is_head_transpose(node):
        return None
    source = through_copies(node.args[0])
    if isinstance(source, fx.Node) and source.target is operator.getitem and source.args[1] == 0:
        source = source.args[0]
    packed: torch.Tensor | None = emitter.memo.get(("packed output", source))
    return packed


def remember_output(emitter: Emitter, node: fx.Node, packed: torch.Tensor) -> None:
    """Note that output 0 of `node` is also at hand as `packed` [B,T,H*D]."""
    emitter.memo["packed output", node] = packed


@lowers(*_RESHAPES)
def join_heads(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """[B,T,H,D] -> [B,T,H*D] straight from the fused operator's own packed output."""
    packed = _packed_output(emitter, node.args[0])
    sizes = node.args[1]
    if packed is None or not isinstance(sizes, (list, tuple)) or len(sizes) != 3:
        return None
    last = emitter.value(sizes[2])
    middle = emitter.value(sizes[1])
    joins = isinstance(last, int) and last in (-1, packed.shape[2])
    return (
        packed if joins and (last != -1 or not isinstance(middle, int) or middle != packed.shape[2]) else None
    )


@lowers(aten.flatten.using_ints)
def flatten_heads(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """The same, spelled `flatten(2)`."""
    packed = _packed_output(emitter, node.args[0])
    return (
        packed if packed is not None and tuple(node.args[1:]) in ((2,), (2, -1), (2, 3), (-2, -1)) else None
    )
