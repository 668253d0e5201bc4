"""Find the gated feed-forward layers of a captured graph: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.regions.attention import argument, attention_regions
from memcompile.regions.weights import layer_of, module_path

aten: Any = torch.ops.aten
SPARSE_FFN = torch.ops.memcompile.sparse_ffn.default
_LINEAR = (aten.linear.default, torch.ops.memcompile.quantized_linear.default)


@dataclass(frozen=True)
class FfnRegion:
    """One gated feed-forward layer. `node` gives its output; `keep` 0: it computes every neuron.

    reason: why its parts cannot be read off the graph, where they cannot; then the rest is unknown.
    """

    node: fx.Node
    region: str
    path: str
    layer: int | None
    width: int
    neurons: int
    activation: str = ""
    keep: int = 0
    counted: bool = False
    x: fx.Node | None = None
    gate: fx.Node | None = None
    up: fx.Node | None = None
    down: fx.Node | None = None
    reason: str = ""


def ffn_regions(graph_module: fx.GraphModule) -> list[FfnRegion]:
    """Every gated feed-forward layer, in graph order; those that a rewrite made sparse too."""
    layers = {region.layer for region in attention_regions(graph_module)}
    found = []
    for node in graph_module.graph.nodes:
        if node.target is SPARSE_FFN:
            found.append(_sparse(node, layers))
        elif node.target in _LINEAR and (gated := _gated(node)) is not None:
            found.append(_dense(node, *gated, layers))
    return found


def _sparse(node: fx.Node, layers: set[int]) -> FfnRegion:
    path = str(node.meta["ffn_path"])
    neurons, width = argument(node, "gate").meta["val"].shape
    counted = bool(node.meta.get("counted"))
    return FfnRegion(
        node, path, path, layer_of(path, layers), int(width), int(neurons), str(argument(node, "activation")),
        int(argument(node, "keep")), counted,
    )  # fmt: skip


def _gated(down: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """The gate's and the other product, and the activation, where `down` ends a gated layer."""
    product = down.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    for active, up in (product.args, product.args[::-1]):
        if not isinstance(active, fx.Node) or not isinstance(up, fx.Node) or up.target not in _LINEAR:
            continue
        name = _activation(active)
        gate = active.args[0] if name else None
        if name and isinstance(gate, fx.Node) and gate.target in _LINEAR and gate.args[0] is up.args[0]:
            return gate, up, name
    return None


def _activation(node: fx.Node) -> str:
    if node.target is aten.gelu.default:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    return {aten.silu.default: "silu", aten.relu.default: "relu"}.get(node.target, "")


def _dense(down: fx.Node, gate: fx.Node, up: fx.Node, activation: str, layers: set[int]) -> FfnRegion:
    # the path of the layer is what the three products have in common
    path = module_path(down).rpartition(".")[0] or down.name
    width, neurons = int(down.meta["val"].shape[-1]), int(gate.meta["val"].shape[-1])
    products = (gate, up, down)
    reason = ""
    if any(node.target is not aten.linear.default for node in products):
        reason = "its weights are quantised, and the kernel reads floats; leave one of the two passes out"
    elif any(len(node.args) > 2 and node.args[2] is not None for node in products):
        reason = "its products have biases"
    elif any(isinstance(node.args[1], fx.Node) and node.args[1].op != "get_attr" for node in products):
        reason = "its weights are computed from others"
    elif len(down.args[0].users) > 1 or any(len(node.users) > 1 for node in (gate, up)):  # type: ignore[union-attr]
        reason = "its neurons are read by something else as well"
    x, (gate_weight, up_weight, down_weight) = gate.args[0], (node.args[1] for node in products)
    assert isinstance(x, fx.Node)
    assert isinstance(gate_weight, fx.Node)
    assert isinstance(up_weight, fx.Node)
    assert isinstance(down_weight, fx.Node)
    return FfnRegion(
        down, path, path, layer_of(path, layers), width, neurons, activation, x=x, gate=gate_weight,
        up=up_weight, down=down_weight, reason=reason,
    )  # fmt: skip
