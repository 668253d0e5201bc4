"""The experts of a mixture as regions of `weights.quantize`, and as codes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import fx

from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.regions import argument, attention_regions
from memcompile.regions.weights import module_path
from memcompile.rewrite.emit import Emit
from memcompile.weights.methods import ZeroPoint, quantize
from memcompile.weights.parameter import evaluated

EXPERTS: Final[Any] = torch.ops.memcompile.experts.default
QUANTIZED: Final[Any] = torch.ops.memcompile.quantized_experts.default
_INDEX: Final = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class ExpertsRegion:
    """All experts of one layer. rows and width: of all their weights as one matrix; bits: 0 while floats."""

    node: fx.Node
    region: str
    path: str
    layer: int | None
    rows: int
    width: int
    bits: int
    kind: Literal["experts"] = "experts"

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """gate_up [E,2F,M] and down [E,M,F], when the graph stores them."""
        found = []
        for name in ("gate_up", "down"):
            node = argument(self.node, name)
            if node.op != "get_attr":
                return None
            owner: Any = node.graph.owning_module
            for part in str(node.target).split("."):
                owner = getattr(owner, part)
            found.append(owner.detach().mT if bool(argument(self.node, "transposed")) else owner.detach())
        return found[0], found[1]


def expert_regions(graph_module: fx.GraphModule) -> list[ExpertsRegion]:
    """The experts of every mixture, in graph order."""
    layers = {region.layer for region in attention_regions(graph_module)}
    found = []
    for node in graph_module.graph.nodes:
        if node.target is not EXPERTS and node.target is not QUANTIZED:
            continue
        path = module_path(node)
        number = _INDEX.search(path)
        layer = int(number[1]) if number and int(number[1]) in layers else None
        model = int(node.args[0].meta["val"].shape[-1])
        name = "gate_up" if node.target is EXPERTS else "gate_up_scales"
        shape = argument(node, name).meta["val"].shape
        hidden = int(min(shape[1:], key=lambda size: size == model)) if name == "gate_up" else int(shape[1])
        bits = int(argument(node, "bits")) if node.target is QUANTIZED else 0
        rows = int(shape[0]) * hidden * 3 // 2
        found.append(ExpertsRegion(node, path or node.name, path, layer, rows, model, bits))
    return found


def quantize_experts(
    region: ExpertsRegion,
    *,
    bits: int,
    block: int,
    zero_point: ZeroPoint,
    method: str,
    int8_activations: bool,
    emit: Emit,
) -> None:
    """Let the region read codes: rows of gate and up alternate, as the operator wants them."""
    weights = region.stored
    assert weights is not None
    gate_up, down = (evaluated(weight) for weight in weights)
    experts, rows, model = gate_up.shape
    alternating = gate_up.reshape(experts, 2, rows // 2, model).transpose(1, 2).reshape(-1, model)
    operands: list[fx.Node | None] = []
    for name, weight in (("gate_up", alternating), ("down", down.reshape(experts * model, -1))):
        found = quantize(weight, bits=bits, block=block, zero_point=zero_point, method=method)
        operands += _store(found, experts, f"{region.region}_{name}", emit, region.node)
    node = region.node
    x, index, weight_node = node.args[:3]
    made = emit.call(
        QUANTIZED, x, index, weight_node, *operands, argument(node, "activation"), bits, int8_activations,
        before=node,
    )  # fmt: skip
    read = [argument(node, name) for name in ("gate_up", "down")]
    emit.replace_uses(node, made)
    emit.erase(node)
    for weight_read in read:
        if not weight_read.users:
            emit.erase(weight_read)


def _store(
    found: QuantizedWeight, experts: int, name: str, emit: Emit, before: fx.Node
) -> list[fx.Node | None]:
    nodes: list[fx.Node | None] = []
    for part, tensor in (
        ("codes", found.codes),
        ("scales", found.scales),
        ("zero_points", found.zero_points),
    ):
        if tensor is None:
            nodes.append(None)
            continue
        each = tensor.reshape(experts, -1, *tensor.shape[1:]).contiguous()
        nodes.append(emit.buffer(f"{name}_{part}", each, before=before))
    return nodes
