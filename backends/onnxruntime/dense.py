"""Matrix products, norms and activations as the operators ONNX Runtime runs fastest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import Emitter, emit, lowers
from memcompile.backends.onnxruntime.nodes import MICROSOFT

aten: Any = torch.ops.aten


@lowers(aten.linear.default)
def lower_linear(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """FusedMatMul reads the weight as torch keeps it, [out,in]: no copy, and tied weights stay one."""
    x, weight = emitter.value(node.args[0]), emitter.value(node.args[1])
    if x.ndim < 2:
        return None
    product = emit(
        f"{MICROSOFT}::FusedMatMul",
        [x, weight],
        {"transB": 1},
        like=x,
        shape=(*x.shape[:-1], weight.shape[0]),
    )
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return product if bias is None else product + emitter.value(bias)


@lowers(torch.ops.memcompile.rms_norm.default)
def lower_rms_norm(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """RMSNormalization; `fuse.py` joins it with the residual addition before it."""
    x, weight = emitter.value(node.args[0]), emitter.value(node.args[1])
    eps = node.args[2] if len(node.args) > 2 else node.kwargs["eps"]
    if weight.ndim != 1:
        return None
    return emit("RMSNormalization", [x, weight], {"axis": -1, "epsilon": float(eps)}, like=x)  # type: ignore[arg-type]


@lowers(aten.silu.default)
def lower_silu(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """x * sigmoid(x) in one pass over the data."""
    x = emitter.value(node.args[0])
    return emit(f"{MICROSOFT}::QuickGelu", [x], {"alpha": 1.0}, like=x)


@lowers(aten.gelu.default)
def lower_gelu(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """Exact or tanh gelu as one operator."""
    x = emitter.value(node.args[0])
    approximate = str(node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none"))
    return emit("Gelu", [x], {"approximate": approximate}, like=x, version=20)
