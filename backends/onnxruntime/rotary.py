"""`memcompile::rotary` as ai.onnx RotaryEmbedding, which wants the angles of one half of the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import Emitter, emit, lowers
from memcompile.backends.onnxruntime.layout import pack_heads, remember_packed, through_copies

aten: Any = torch.ops.aten
# operators that act on each angle alone, so that equal halves stay equal
_ELEMENTWISE = {
    aten.cos.default, aten.sin.default, aten.to.dtype, aten._to_copy.default, aten.to.device,
    aten.neg.default,
    aten.to.dtype_layout, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default,
}  # fmt: skip
_WITH_SCALAR = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


def halves_are_equal(node: Any) -> bool:
    """Whether the last axis of `node` is provably two copies of the same half."""
    while isinstance(node, fx.Node):
        node = through_copies(node)
        if node.target is aten.cat.default:
            parts = node.args[0]
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            value = node.meta.get("val")
            last = axis == -1 or (isinstance(value, torch.Tensor) and axis == value.ndim - 1)
            return last and len(parts) == 2 and parts[0] is parts[1]
        plain = node.target in _ELEMENTWISE
        scaled = node.target in _WITH_SCALAR and not isinstance(node.args[1], fx.Node)
        if node.target is aten.unsqueeze.default and node.args[1] in (0, 1):
            plain = True
        if not (plain or scaled):
            return False
        node = node.args[0]
    return False


@lowers(torch.ops.memcompile.rotary.default)
def lower_rotary(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """One RotaryEmbedding on the packed heads; the [B,H,T,D] value is a view of it."""
    x_node, cos_node, sin_node = node.args[:3]
    if not (halves_are_equal(cos_node) and halves_are_equal(sin_node)):
        return None
    assert isinstance(x_node, fx.Node)
    x = emitter.value(x_node)
    batch, heads, tokens, width = x.shape
    if width % 2:
        return None
    packed_x = pack_heads(emitter, x_node)
    angles = [_half(emitter, angle, batch) for angle in (cos_node, sin_node)]
    packed = emit("RotaryEmbedding", [packed_x, *angles], {"num_heads": int(heads)}, like=packed_x)
    remember_packed(emitter, node, packed)
    rotated: torch.Tensor = packed.view(batch, tokens, heads, width).transpose(1, 2)
    return rotated


def _half(emitter: Emitter, node: Any, batch: Any) -> torch.Tensor:
    key = ("half", node, str(batch))
    if key not in emitter.memo:
        angles = emitter.value(node)
        half = angles[..., : angles.shape[-1] // 2]
        emitter.memo[key] = half if half.shape[0] == batch else half.expand(batch, -1, -1)
    value: torch.Tensor = emitter.memo[key]
    return value
