"""Put quantised weights into a graph in the place of stored floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.regions import WeightRegion
from memcompile.weights.parameter import hollow

aten: Any = torch.ops.aten
# what the node keeps of the one it stands for
_PLACE_IN_META = ("nn_module_stack", "path", "layer", "stack_trace")

Operands = tuple[fx.Node | None, ...]


def operands(node: fx.Node) -> tuple[Any, Any]:
    """Input and bias of a product."""
    if node.target is aten.addmm.default:
        return node.args[1], node.args[0]
    return node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def store(graph_module: fx.GraphModule, region: WeightRegion, weight: QuantizedWeight) -> Operands:
    """Store a weight's tensors as buffers named after the region; gives the nodes that read them."""
    nodes: list[fx.Node | None] = []
    mode = getattr(region.node.meta["val"], "fake_mode", None)
    for name, tensor in weight.operands().items():
        if tensor is None:
            nodes.append(None)
            continue
        buffer = "".join(c if c.isalnum() else "_" for c in f"{region.region}_{name}")
        graph_module.register_buffer(buffer, tensor)
        with graph_module.graph.inserting_before(region.node):
            node = graph_module.graph.get_attr(buffer)
        node.meta["val"] = tensor if mode is None else mode.from_tensor(hollow(tensor), static_shapes=True)
        nodes.append(node)
    return tuple(nodes)


def replace(region: WeightRegion, stored: Operands, bits: int, *, int8_activations: bool) -> None:
    """Let the region read the stored weight instead of its floats."""
    node, weight = region.node, region.weight
    target: Any
    if region.kind == "embedding":
        target = torch.ops.memcompile.quantized_embedding.default
        arguments = (node.args[1], *stored, bits, region.width, node.meta["val"].dtype)
    else:
        x, bias = operands(node)
        target = torch.ops.memcompile.quantized_linear.default
        arguments = (x, *stored, bias, bits, int8_activations)
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, arguments)
    made.meta.update({key: node.meta[key] for key in _PLACE_IN_META if key in node.meta})
    made.meta["val"] = node.meta["val"]
    made.meta["weight_region"] = region.region
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    if not weight.users:
        weight.graph.erase_node(weight)
