"""Replace root-mean-square norms by `memcompile::rms_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.frontend.recognise.axes import CASTS
from memcompile.frontend.recognise.replace import Local, replace_all

aten = torch.ops.aten
RMS_NORM = torch.ops.memcompile.rms_norm.default


@dataclass(frozen=True, slots=True)
class _Norm:
    out: fx.Node
    x: fx.Node
    weight: fx.Node
    eps: float


def recognise_norms(graph_module: fx.GraphModule) -> int:
    """Replace every RMS norm with a weight by `memcompile::rms_norm`, in place; returns how many.

    Found: `x * rsqrt(mean(x^2) + eps)` (also as a power, or divided by a square root) in any float type,
    times a weight [D] before or after the cast back, `1 + weight` included; and `aten.rms_norm`.
    Each is verified against the nodes it replaces, in float64, before it is accepted.
    """
    return replace_all(graph_module, _find)


def _find(graph: fx.Graph, node: fx.Node) -> Local | None:
    norm = _read_fused(node) if node.target is aten.rms_norm.default else _read_written(node)
    if norm is None:
        return None
    return Local(norm.out, (norm.x, norm.weight), RMS_NORM, (norm.x, norm.weight, norm.eps))


def _read_fused(node: fx.Node) -> _Norm | None:
    names = ("input", "normalized_shape", "weight", "eps")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight = given["input"], given.get("weight")
    shape = given["normalized_shape"]
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and isinstance(shape, (list, tuple))):
        return None
    if len(shape) != 1 or x.meta["val"].dtype != node.meta["val"].dtype:
        return None
    eps = given.get("eps")
    if eps is None:
        # the default is that of the type the operator computes in; written out, it is the same everywhere
        eps = torch.finfo(torch.promote_types(x.meta["val"].dtype, torch.float32)).eps
        node.args, node.kwargs = (x, shape, weight, eps), {}
    return _Norm(node, x, weight, float(eps)) if isinstance(eps, (int, float)) else None


def _read_written(node: fx.Node) -> _Norm | None:
    """Read a norm from the node that computes the inverse root."""
    if node.target is aten.rsqrt.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        mean, divides = node.args[0], False
    elif node.target is aten.sqrt.default:
        mean, divides = node.args[0], True
    else:
        return None
    found = _mean_of_squares(mean)
    if found is None:
        return None
    wide, eps = found
    inverse = node
    if divides and len(node.users) == 1 and next(iter(node.users)).target is aten.reciprocal.default:
        inverse, divides = next(iter(node.users)), False
    normed = _only_user(inverse)
    if normed is None or normed.target is not (aten.div.Tensor if divides else aten.mul.Tensor):
        return None
    if divides and normed.args != (wide, inverse):
        return None
    if not divides and set(normed.args) != {wide, inverse}:
        return None
    return _with_weight(wide, normed, eps)


def _mean_of_squares(node: object) -> tuple[fx.Node, float] | None:
    """`mean(x^2, -1) + eps`: x and eps."""
    if not (isinstance(node, fx.Node) and node.target is aten.add.Tensor and len(node.args) == 2):
        return None
    mean, eps = node.args
    if isinstance(eps, fx.Node):
        mean, eps = eps, mean
    if not (isinstance(mean, fx.Node) and mean.target is aten.mean.dim and isinstance(eps, float)):
        return None
    square, dims = mean.args[0], mean.args[1]
    if len(mean.args) < 3 or mean.args[2] is not True or not isinstance(square, fx.Node):
        return None
    last = mean.meta["val"].ndim - 1
    if not isinstance(dims, (list, tuple)) or list(dims) not in ([-1], [last]):
        return None
    x = square.args[0]
    is_square = (square.target is aten.pow.Tensor_Scalar and square.args[1] == 2) or (
        square.target is aten.mul.Tensor and square.args[0] is square.args[1]
    ) or square.target is aten.square.default  # fmt: skip
    return (x, eps) if is_square and isinstance(x, fx.Node) else None


def _with_weight(wide: fx.Node, normed: fx.Node, eps: float) -> _Norm | None:
    """Follow casts to the product with the weight and, if the type was widened, back to the type of x."""
    node: fx.Node | None = normed
    while (user := _only_user(node)) is not None and user.target in CASTS:
        node = user
    if user is None or user.target is not aten.mul.Tensor:
        return None
    left, right = user.args
    weight = right if left is node else left
    if not isinstance(weight, fx.Node) or weight is node or weight.meta["val"].ndim != 1:
        return None
    x = wide
    if wide.target in CASTS and isinstance(wide.args[0], fx.Node):
        x = wide.args[0]
    out = user
    after = _only_user(out)
    dtype = x.meta["val"].dtype
    if out.meta["val"].dtype != dtype and after is not None and after.target in CASTS:
        out = after
    if out.meta["val"].dtype != dtype:
        return None
    return _Norm(out, x, weight, eps)


def _only_user(node: fx.Node | None) -> fx.Node | None:
    if node is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.op == "call_function" else None


__all__: Sequence[str] = ("recognise_norms",)
