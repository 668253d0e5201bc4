"""How pruning changes the graph: smaller products in the place of whole ones, and layers taken out."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from memcompile.passes.weights.structure import ChannelsRegion, LayerRegion, keeps_channels
from memcompile.regions import WeightRegion
from memcompile.rewrite.emit import Emit
from memcompile.weights.place import operands

aten: Any = torch.ops.aten
# what the node that was pruned is marked with
MARK: Final = "pruned"


def drop_channels(region: ChannelsRegion, keep: torch.Tensor, fitted: torch.Tensor, emit: Emit) -> None:
    """Leave the channels `keep` of a block, and let `fitted` [M,kept] read them."""
    emit.decide(f"{len(keep)} of {region.channels} channels stay")
    made: dict[fx.Node, fx.Node] = {}
    for maker in region.makers:
        weight = maker.stored
        assert weight is not None
        made[maker.node] = smaller(maker, weight[keep], operands(maker.node)[0], emit, rows=keep)
    for node in region.between:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: made.get(n, n))
        if keeps_channels(node, region.channels):
            shape: Any = args[1]
            args = (args[0], [*shape[:-1], len(keep)])
        assert callable(node.target)
        made[node] = emit.call(node.target, *args, before=region.node, like=node, **kwargs)
    last = smaller(region.down, fitted, made[operands(region.node)[0]], emit)
    emit.mark(last, MARK, "channels")
    emit.replace_uses(region.node, last)
    erase_dead(region.node, emit)


def smaller(
    region: WeightRegion, weight: torch.Tensor, x: fx.Node, emit: Emit, *, rows: torch.Tensor | None = None
) -> fx.Node:
    """A product like the region's with a smaller weight [n,k], before it; `rows` of the bias stay, or all."""
    node = region.node
    bias = operands(node)[1]
    stored = emit.buffer(
        f"{region.region}_kept", (weight.t() if region.transposed else weight).contiguous(), before=node
    )
    if bias is not None and rows is not None:
        index = emit.buffer(f"{region.region}_rows", rows, before=node)
        bias = emit.call(aten.index_select.default, bias, 0, index, before=node)
    arguments = (bias, x, stored) if region.transposed else (x, stored, bias)
    return emit.call(node.target, *arguments, before=node, like=node)  # type: ignore[arg-type]


def drop_layer(region: LayerRegion, emit: Emit) -> None:
    """Take a layer out of the residual stream."""
    for block in reversed(region.blocks):
        emit.replace_uses(block.addition, block.stream)
        erase_dead(block.addition, emit)


def erase_dead(node: fx.Node, emit: Emit) -> None:
    """Erase a node that nobody reads, and what only it read."""
    waiting = [node]
    erased: set[fx.Node] = set()
    while waiting:
        one = waiting.pop()
        if one in erased or one.users or one.op in ("placeholder", "output"):
            continue
        waiting.extend(one.all_input_nodes)
        emit.erase(one)
        erased.add(one)
