"""Replace half-split rotary embeddings by `memcompile::rotary`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.frontend.recognise.emit import Emitter
from memcompile.frontend.recognise.replace import Local, replace_all

aten = torch.ops.aten
ROTARY = torch.ops.memcompile.rotary.default


def recognise_rotary(graph_module: fx.GraphModule) -> int:
    """Replace every `x * cos + rotate_half(x) * sin` on x [B,H,T,D] by `memcompile::rotary`, in place.

    cos and sin may be [B,T,D] with a head axis inserted, [1,1,T,D] or [T,D]; halves may be slices or chunks.
    Each is verified against the nodes it replaces, in float64. Returns how many were replaced.
    """
    return replace_all(graph_module, _find)


def _find(graph: fx.Graph, node: fx.Node) -> Local | None:
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    for plain, turned in (node.args, node.args[::-1]):
        found = _read(node, plain, turned)
        if found is not None:
            return found
    return None


def _read(out: fx.Node, plain: Any, turned: Any) -> Local | None:
    if not (_is_product(plain) and _is_product(turned)):
        return None
    for rotated, sin in (turned.args, turned.args[::-1]):
        x = _rotated(rotated)
        if x is None or x not in plain.args:
            continue
        cos = plain.args[1] if plain.args[0] is x else plain.args[0]
        value = x.meta["val"]
        if not (isinstance(cos, fx.Node) and isinstance(sin, fx.Node)) or value.ndim != 4:
            return None
        if out.meta["val"].dtype != value.dtype or cos is x or sin is x:
            return None

        def prepare(emit: Emitter, x: fx.Node = x, cos: fx.Node = cos, sin: fx.Node = sin) -> Sequence[Any]:
            return [x, _angles(emit, cos), _angles(emit, sin)]

        return Local(out, (x, _angle_source(cos), _angle_source(sin)), ROTARY, prepare=prepare)
    return None


def _is_product(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.mul.Tensor and len(node.args) == 2


def _rotated(node: Any) -> fx.Node | None:
    """`cat(-x[..., D/2:], x[..., :D/2])`: x."""
    if not (
        isinstance(node, fx.Node)
        and node.target is aten.cat.default
        and isinstance(node.args[0], (list, tuple))
    ):
        return None
    parts = node.args[0]
    if len(parts) != 2 or not all(isinstance(p, fx.Node) for p in parts):
        return None
    high, low = parts
    assert isinstance(high, fx.Node)
    if high.target is aten.neg.default or (high.target is aten.mul.Tensor and high.args[1] == -1):
        high = high.args[0]
    else:
        return None
    sources = [_half_of(half) for half in (high, low)]
    # which half is which, and along which axis, the verification tells
    return sources[0] if sources[0] is sources[1] else None


def _half_of(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.slice.Tensor:
        source = node.args[0]
    elif node.target is operator.getitem and getattr(node.args[0], "target", None) in (
        aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.tensor_split.sections,
    ):  # fmt: skip
        source = node.args[0].args[0]  # type: ignore[union-attr]
    else:
        return None
    return source if isinstance(source, fx.Node) else None


def _angle_source(node: fx.Node) -> fx.Node:
    """cos or sin before its head axis was inserted."""
    if node.target is aten.unsqueeze.default and node.args[1] in (1, -3):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].ndim == 3:
            return source
    return node


def _angles(emit: Emitter, node: fx.Node) -> fx.Node:
    """cos or sin as [B or 1,T,D]."""
    source = _angle_source(node)
    rank = source.meta["val"].ndim
    if source is not node:
        return source
    if rank == 2:
        return emit.call(aten.unsqueeze.default, node, 0)
    return emit.call(aten.squeeze.dim, node, 1) if rank == 4 else node
