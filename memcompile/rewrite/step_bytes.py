"""Where the bytes of a decode step go: weights, state and activations, read off the graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from memcompile.artifact import StepBytes
from memcompile.regions import WeightRegion, argument, attention_regions, weight_regions
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.entry import Workload

_EXPERTS = torch.ops.memcompile.experts.default
_QUANTIZED_EXPERTS = torch.ops.memcompile.quantized_experts.default


def step_bytes(
    graph_module: fx.GraphModule, workload: Workload, state_bytes: Mapping[str, int] | None = None
) -> StepBytes:
    """The bytes of the workload's last decode step. state_bytes: by region, where they are known better."""
    known = state_bytes or {}
    attentions = attention_regions(graph_module)
    state = sum(
        known[region.region] if region.region in known else decode_cost(region, workload).state_bytes
        for region in attentions
    )
    weights, counted = 0, set[str]()
    activations = 0
    for region in weight_regions(graph_module):
        counted |= _stored_names(region)
        whole, element = _weight_bytes(region)
        if region.kind == "embedding":
            whole = whole * min(workload.batch, region.rows) // region.rows
        else:
            activations += workload.batch * (region.width + region.rows) * element
        weights += whole
    for attention in attentions:
        element = argument(attention.node, "k").meta["val"].element_size()
        width = 2 * (attention.heads + attention.kv_heads) * attention.head_dim
        activations += workload.batch * width * element
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in counted:
            counted.add(str(node.target))
            weights += int(_bytes(node) * _share_read(node, workload))
    return StepBytes(weights, state, activations)


def _stored_names(region: WeightRegion) -> set[str]:
    return {str(node.target) for node in _operands(region)}


def _operands(region: WeightRegion) -> list[fx.Node]:
    return [node for node in region.node.all_input_nodes if node.op == "get_attr"]


def _weight_bytes(region: WeightRegion) -> tuple[int, int]:
    """Bytes of a region's stored tensors, and of an element of its activations."""
    return sum(_bytes(node) for node in _operands(region)), region.node.meta["val"].element_size()


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _share_read(node: fx.Node, workload: Workload) -> float:
    """The share of a tensor that a step reads: of experts and neurons, those that its tokens choose."""
    for user in node.users:
        if user.target in (_EXPERTS, _QUANTIZED_EXPERTS):
            experts, chosen = node.meta["val"].shape[0], argument(user, "index").meta["val"].shape[1]
            return float(min(1.0, workload.batch * int(chosen) / int(experts)))
        if user.target is torch.ops.memcompile.sparse_ffn.default:
            share = int(argument(user, "keep")) / node.meta["val"].shape[0]
            whole = argument(user, "gate") is node and not user.meta.get("counted")
            return 1.0 if whole else min(1.0, workload.batch * share)
    return 1.0
