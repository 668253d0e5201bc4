"""The device that tracing wrote into a graph, and another one in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Let every node of `module`'s graphs, inner ones included, name `device`.

    Tracing writes the device of the example inputs wherever a model asks for one: in casts, new tensors and
    autocast blocks. Parameters and buffers are moved by `Module.to`.
    """

    def placed(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        before = [(node.args, node.kwargs) for node in part.graph.nodes]
        for node in part.graph.nodes:
            node.args = map_aggregate(node.args, placed)
            node.kwargs = map_aggregate(node.kwargs, placed)
            if node.target is torch.ops.higher_order.wrap_with_autocast:
                node.args = (device.type, *node.args[1:])
        if [(node.args, node.kwargs) for node in part.graph.nodes] != before:
            part.recompile()
