"""What happens to the scores between their product and the softmax: scale, softcap and mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from memcompile.frontend.recognise.axes import CASTS, SHAPE_OPERATIONS, Axis, Untraceable, scalar_factor
from memcompile.frontend.recognise.emit import Emitter, product
from memcompile.frontend.recognise.evaluate import Unevaluable, shape_of
from memcompile.frontend.recognise.layout import Arrangement
from memcompile.frontend.recognise.masks import HIDDEN, Probes, data_of
from memcompile.frontend.recognise.match import Fused, Refused, Written

aten = torch.ops.aten
_MULTIPLY = (aten.mul.Tensor, aten.div.Tensor)


def scale_and_softcap(match: Written, probes: Probes) -> tuple[float, float]:
    """The factor on the scores and the softcap (0: none).

    Refuses a factor that is not one number, the same for all scores and at all lengths.
    """
    gain = match.queries_keys.alpha
    before_tanh: float | None = None
    for before, node in zip(match.scores, match.scores[1:], strict=False):
        if node.target is aten.tanh.default:
            if before_tanh is not None:
                raise Refused("the scores go through tanh twice")
            before_tanh, gain = gain, 1.0
        elif node.target is aten.neg.default or (
            node.target is aten.sub.Tensor and node.args[0] is not before
        ):
            gain = -gain
        elif node.target in _MULTIPLY:
            known = scalar_factor(node)
            gain *= known[1] if known is not None else _one_number(node, before, probes)
    if before_tanh is None:
        return gain, 0.0
    # cap * tanh(scores * scale / cap)
    return before_tanh * gain, gain


def _one_number(node: fx.Node, before: fx.Node, probes: Probes) -> float:
    side = node.args[1] if node.args[0] is before else node.args[0]
    assert isinstance(side, fx.Node)
    if side is before or (node.target is aten.div.Tensor and node.args[1] is before):
        raise Refused(f"the scores are not scaled by a number ({node.name})")
    inputs, others = data_of(probes, side)
    if inputs or others:
        raise Refused(f"the scale of the scores depends on data ({node.name})")
    found: set[float] = set()
    for length in (3, 6, 11):
        try:
            values = probes.evaluator(probes.sizes(length, 2))(side)
        except Unevaluable as error:
            raise Refused(f"the scale of the scores cannot be evaluated ({error})") from error
        # zeros stand where a multiplied mask hides scores
        found |= {float(v) for v in torch.as_tensor(values).flatten().tolist() if v != 0}
    if len(found) != 1:
        raise Refused(f"the scale of the scores is not one number ({node.name})")
    factor = found.pop()
    return 1.0 / factor if node.target is aten.div.Tensor else factor


def sides(match: Written | Fused) -> list[fx.Node]:
    """The tensors that join the scores on their way to the softmax."""
    if isinstance(match, Fused):
        return [match.mask] if match.mask is not None else []
    found = [match.queries_keys.addend] if match.queries_keys.addend is not None else []
    for before, node in zip(match.scores, match.scores[1:], strict=False):
        found += [
            n for n in node.all_input_nodes if n is not before and isinstance(n.meta.get("val"), torch.Tensor)
        ]
    return list(dict.fromkeys(found))


class _MaskWriter:
    """Replays the score path on a score of zero: what is left is the mask. None stands for that zero."""

    def __init__(self, emit: Emitter, dtype: torch.dtype) -> None:
        self.emit = emit
        self.dtype = dtype

    def zero(self) -> fx.Node:
        return self.emit.call(aten.full.default, [], 0.0, dtype=self.dtype)

    def additive(self, value: fx.Node | None) -> fx.Node:
        if value is None:
            return self.zero()
        if value.meta["val"].dtype != torch.bool:
            return value
        return self.emit.call(aten.where.ScalarOther, value, self.zero(), -math.inf)

    def step(self, value: fx.Node | None, before: fx.Node, node: fx.Node) -> fx.Node | None:
        target, args = node.target, node.args
        if target in CASTS:
            return value
        if value is None and (
            target in SHAPE_OPERATIONS
            or target in (*_MULTIPLY, aten.tanh.default, aten.neg.default)
            or (target is aten.add.Tensor and not isinstance(_other(node, before), fx.Node))
        ):
            return None
        visible = self._visible(before, node)
        if visible is not None and (value is None or value.meta["val"].dtype == torch.bool):
            return visible if value is None else self.emit.call(aten.logical_and.default, value, visible)
        if value is None and target is aten.add.Tensor and not node.kwargs:
            other = _other(node, before)
            assert isinstance(other, fx.Node)
            return other
        additive = self.additive(value)
        if target in SHAPE_OPERATIONS:
            shape = shape_of(before, self.emit.sizes)
            sizes = [self.emit.size(n, (before,)) for n in shape]
            additive = self.emit.call(aten.expand.default, additive, sizes)
        return self.emit.call(
            target, *[additive if a is before else a for a in args],  # type: ignore[arg-type]
            **{k: additive if a is before else a for k, a in node.kwargs.items()},
        )  # fmt: skip

    def _visible(self, before: fx.Node, node: fx.Node) -> fx.Node | None:
        """The bool mask (True: may look) of a node that replaces hidden scores by a very negative number."""
        target, args = node.target, node.args
        if target is aten.masked_fill.Scalar and args[0] is before and _is_hidden(args[2]):
            return self.emit.call(aten.logical_not.default, args[1])
        if target is aten.where.ScalarOther and args[1] is before and _is_hidden(args[2]):
            return self._as_bool(args[0])
        if target is aten.where.ScalarSelf and args[2] is before and _is_hidden(args[1]):
            return self.emit.call(aten.logical_not.default, args[0])
        return None

    def _as_bool(self, mask: Any) -> fx.Node:
        assert isinstance(mask, fx.Node)
        if mask.meta["val"].dtype == torch.bool:
            return mask
        return self.emit.call(aten.ne.Scalar, mask, 0)


def _other(node: fx.Node, before: fx.Node) -> Any:
    return node.args[1] if node.args[0] is before else node.args[0]


def _is_hidden(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= HIDDEN


def write_mask(match: Written | Fused, arrangement: Arrangement, emit: Emitter) -> fx.Node | None:
    """Emit the mask as one tensor, bool (True: may look) or additive, that fits [B,H,T,S]; None: no mask."""
    if isinstance(match, Fused):
        mask = match.mask
    else:
        writer = _MaskWriter(emit, match.queries_keys.node.meta["val"].dtype)
        mask = None
        first = match.queries_keys
        if first.addend is not None:
            mask = first.addend if first.beta == 1.0 else emit.call(aten.mul.Tensor, first.addend, first.beta)
        for before, node in zip(match.scores, match.scores[1:], strict=False):
            mask = writer.step(mask, before, node)
    return None if mask is None else _in_order(mask, arrangement, emit)


def _in_order(mask: fx.Node, found: Arrangement, emit: Emitter) -> fx.Node:
    """Move a mask from the softmax's axes to [B,H,T,S]."""
    shape = shape_of(mask, emit.sizes)
    roles = [found.batch, found.heads, found.queries, found.keys]
    if len(shape) <= 2 and found.scores[-2:] == roles[2:]:
        return mask
    if found.scores == roles:
        return mask
    if len(shape) > len(found.scores):
        raise Refused("the mask has more axes than the scores")
    axes: list[Axis] = [[] for _ in found.scores]
    for index, size in enumerate(reversed(shape)):
        axis = found.scores[-1 - index]
        if size != 1:
            if size != product(axis):
                raise Refused("the mask has an axis that the scores do not have")
            axes[-1 - index] = axis
    present = [atom for axis in axes for atom in axis]
    near = (mask,)
    x = emit.reshape(mask, [a.size for a in present], near)
    order = [present.index(a) for role in roles for a in role if a in present]
    x = emit.permute(x, order)
    sizes: list[int] = []
    for role in roles:
        inside = [a for a in role if a in present]
        if inside and len(inside) != len(role):
            raise Untraceable("the mask differs between some of the heads only")
        sizes.append(product(inside))
    return emit.reshape(x, sizes, near)


__all__ = ["scale_and_softcap", "sides", "write_mask"]
