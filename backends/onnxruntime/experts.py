"""`memcompile::experts`: each expert multiplies only the token rows that chose it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import Emitter, emit, lowers
from memcompile.backends.onnxruntime.nodes import MICROSOFT

_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": (f"{MICROSOFT}::QuickGelu", {"alpha": 1.0}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


@lowers(torch.ops.memcompile.experts.default)
def lower_experts(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """Per expert: NonZero finds its (token, slot) pairs, Gather their rows; one ScatterND adds all results.

    How many rows an expert gets is known at run time only. The traced shapes claim N rows for each; they are
    dropped from the finished graph, which ONNX Runtime then sizes itself.
    """
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, index, weight, gate_up, down = (
        emitter.value(given[name]) for name in ("x", "index", "weight", "gate_up", "down")
    )
    activation, transposed = str(given["activation"]), bool(given["transposed"])
    rows, model = x.shape
    chosen = index.shape[1]
    flat_index, flat_weight = index.reshape(-1), weight.reshape(-1)
    tokens, results = [], []
    for expert in range(gate_up.shape[0]):
        pairs = emit("NonZero", [flat_index == expert], {}, like=index, shape=(1, rows), version=13)
        pair = emit("Squeeze", [pairs, torch.tensor([0])], {}, like=pairs, shape=(rows,))
        token = pair // chosen
        share = _rows(flat_weight, pair, (rows,)).to(x.dtype)
        hidden = _product(_rows(x, token, (rows, model)), gate_up[expert], transposed)
        half = hidden.shape[1] // 2
        operator, attributes = _ACTIVATIONS[activation]
        gate = emit(operator, [hidden[:, :half]], attributes, like=hidden, shape=(rows, half), version=20)
        done = _product(gate * hidden[:, half:], down[expert], transposed)
        tokens.append(token)
        results.append(done * share.unsqueeze(-1))
    return emit(
        "ScatterND",
        [torch.zeros_like(x), torch.cat(tokens).unsqueeze(-1), torch.cat(results)],
        {"reduction": "add"},
        like=x,
        version=18,
    )


def _rows(values: torch.Tensor, index: torch.Tensor, shape: tuple[Any, ...]) -> torch.Tensor:
    return emit("Gather", [values, index], {"axis": 0}, like=values, shape=shape, version=13)


def _product(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    out = weight.shape[1] if transposed else weight.shape[0]
    attributes = {"transB": 0 if transposed else 1}
    return emit(f"{MICROSOFT}::FusedMatMul", [x, weight], attributes, like=x, shape=(x.shape[0], out))
