"""Scale and shift the input of a product, in the norm that makes it where there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import fx

from memcompile.rewrite.emit import Emit

aten: Any = torch.ops.aten
RMS_NORM = torch.ops.memcompile.rms_norm.default
_MARK: Final = "scaled_input"


def prepared_input(
    x: fx.Node, statistics: Mapping[str, torch.Tensor], emit: Emit, before: fx.Node
) -> fx.Node:
    """`(x - input_shift) * input_factor`, [...,K] each, as the calibration found them; `x` if it found none.

    A factor goes into the weight of the norm that gives `x`, and a shift into its bias if it has one.
    Products that share an input share what is made here.
    """
    factor, shift = statistics.get("input_factor"), statistics.get("input_shift")
    if factor is None and shift is None:
        return x
    made = _made_before(x, factor, shift, emit.graph_module)
    if made is None:
        made = _make(x, factor, shift, emit, before)
        emit.mark(made, _MARK, (x.name, _key(factor, shift)))
    return made


def drop_input(x: fx.Node, emit: Emit) -> None:
    """Erase an input that was replaced, and the stored tensors that only it read, once nobody reads it."""
    if x.users or x.op != "call_function":
        return
    parts = [node for node in x.all_input_nodes if node.op == "get_attr"]
    emit.erase(x)
    for part in parts:
        if not part.users:
            emit.erase(part)


def _make(
    x: fx.Node, factor: torch.Tensor | None, shift: torch.Tensor | None, emit: Emit, before: fx.Node
) -> fx.Node:
    dtype = x.meta["val"].dtype
    name = f"{emit.region}_input"
    parts = _norm_parts(x, emit.graph_module)
    if parts is not None and (shift is None or parts[1] is not None):
        weight, bias = parts
        scale = torch.ones_like(weight, dtype=torch.float32) if factor is None else factor
        stored = emit.buffer(f"{name}_norm", (weight.float() * scale).to(weight.dtype), before=before)
        if x.target is RMS_NORM:
            return emit.call(RMS_NORM, x.args[0], stored, *x.args[2:], before=before, like=x)
        shifted = None if bias is None else (bias.float() - (0 if shift is None else shift)) * scale
        moved = x.args[3] if shifted is None else emit.buffer(
            f"{name}_norm_bias", shifted.to(dtype), before=before
        )  # fmt: skip
        arguments = (*x.args[:2], stored, moved, *x.args[4:])
        return emit.call(aten.layer_norm.default, *arguments, before=before, like=x)
    made = x
    if shift is not None:
        stored = emit.buffer(f"{name}_shift", shift.to(dtype), before=before)
        made = emit.call(aten.sub.Tensor, made, stored, before=before, like=x)
    if factor is not None:
        stored = emit.buffer(f"{name}_factor", factor.to(dtype), before=before)
        made = emit.call(aten.mul.Tensor, made, stored, before=before, like=x)
    return made


def _norm_parts(x: fx.Node, graph_module: fx.GraphModule) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of the norm that gives `x`, when it is one whose weight is stored."""
    if x.target is RMS_NORM:
        weight = _stored(x.args[1], graph_module)
        return None if weight is None else (weight, None)
    if x.target is aten.layer_norm.default and len(x.args) > 3 and len(x.args[1]) == 1:  # type: ignore[arg-type]
        weight, bias = _stored(x.args[2], graph_module), _stored(x.args[3], graph_module)
        return None if weight is None or bias is None else (weight, bias)
    return None


def _stored(node: Any, graph_module: fx.GraphModule) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, torch.Tensor) else None


def _made_before(
    x: fx.Node, factor: torch.Tensor | None, shift: torch.Tensor | None, graph_module: fx.GraphModule
) -> fx.Node | None:
    """What another product of `x` made, if it scales and shifts by the same."""
    wanted = (x.name, _key(factor, shift))
    return next((node for node in graph_module.graph.nodes if node.meta.get(_MARK) == wanted), None)


def _key(*tensors: torch.Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
