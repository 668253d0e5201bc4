"""Parts of a model that can be taken out whole: channels of a feed-forward block, and layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.regions import WeightRegion, weight_regions
from memcompile.weights.place import operands

aten: Any = torch.ops.aten
# each element of the result depends on the same element of the inputs alone
ELEMENTWISE: Final = frozenset(
    {
        aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar,
        aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    }
)  # fmt: skip
RESHAPES: Final = (aten.view.default, aten.reshape.default)
NORMS: Final = (torch.ops.memcompile.rms_norm.default, aten.layer_norm.default)
# what may stand between a product and the addition to the residual stream
_BETWEEN: Final = frozenset({*NORMS, *RESHAPES, aten.dropout.default, aten.mul.Tensor})


@dataclass(frozen=True)
class ChannelsRegion:
    """A feed-forward block: products of one width, elementwise operations, and the product that reads them.

    makers: give the channels; between: elementwise, in graph order; down: takes them.
    """

    region: str
    path: str
    layer: int | None
    makers: tuple[WeightRegion, ...]
    between: tuple[fx.Node, ...]
    down: WeightRegion

    @property
    def node(self) -> fx.Node:
        return self.down.node

    @property
    def channels(self) -> int:
        return self.down.width


@dataclass(frozen=True)
class Block:
    """A block of a layer by its addition to the residual stream, which is that argument of the addition."""

    addition: fx.Node
    place: int

    @property
    def stream(self) -> fx.Node:
        """The stream before the block: as the graph is now, for a block before may have gone."""
        stream = self.addition.args[self.place]
        assert isinstance(stream, fx.Node)
        return stream


@dataclass(frozen=True)
class LayerRegion:
    """A layer of the model: the blocks that it adds to the residual stream, in graph order."""

    region: str
    path: str
    layer: int | None
    blocks: tuple[Block, ...]
    products: tuple[WeightRegion, ...]

    @property
    def node(self) -> fx.Node:
        return self.blocks[-1].addition


def channel_regions(graph_module: fx.GraphModule) -> list[ChannelsRegion]:
    """Every feed-forward block whose channels nothing else reads, in graph order."""
    regions = [r for r in weight_regions(graph_module) if r.kind == "linear" and not r.bits]
    products = {region.node: region for region in regions}
    found = []
    for down in regions:
        traced = _trace(down, products)
        if traced is None:
            continue
        makers, between = traced
        path = down.path.rpartition(".")[0] or down.path
        found.append(ChannelsRegion(f"{path}.channels", path, down.layer, makers, between, down))
    return found


def _trace(
    down: WeightRegion, products: dict[fx.Node, WeightRegion]
) -> tuple[tuple[WeightRegion, ...], tuple[fx.Node, ...]] | None:
    """The products and elementwise nodes behind a product's input; None if there is anything else."""
    between: set[fx.Node] = set()
    makers: set[fx.Node] = set()
    waiting = [operands(down.node)[0]]
    while waiting:
        node = waiting.pop()
        if node in products:
            makers.add(node)
        elif node.target in ELEMENTWISE or keeps_channels(node, down.width):
            between.add(node)
            # the sizes of a reshape are read from elsewhere
            sources = node.all_input_nodes if node.target in ELEMENTWISE else [node.args[0]]
            waiting.extend(n for n in sources if isinstance(n, fx.Node) and n not in between)
        else:
            return None
    inside = {*between, *makers}
    readers = {user for node in inside for user in node.users}
    widths = {products[maker].rows for maker in makers}
    if not between or not readers <= {*between, down.node} or widths != {down.width}:
        return None
    order = {node: index for index, node in enumerate(down.node.graph.nodes)}
    return (
        tuple(products[node] for node in sorted(makers, key=order.__getitem__)),
        tuple(sorted(between, key=order.__getitem__)),
    )


def keeps_channels(node: fx.Node, channels: int) -> bool:
    """Whether a node reshapes the axes before its last one, which holds the channels."""
    if node.target not in RESHAPES or not isinstance(node.args[1], list | tuple):
        return False
    source = node.args[0]
    shape = list(node.args[1])
    return (
        isinstance(source, fx.Node)
        and bool(source.meta["val"].shape[-1] == channels)
        and shape[-1:] == [channels]
    )


def head_of(graph_module: fx.GraphModule, wanted: str, *, fix: str) -> WeightRegion:
    """The product that gives the logits. Raises MC116 where there is none, saying what was `wanted`."""
    head = next((region for region in weight_regions(graph_module) if region.kind == "head"), None)
    if head is None:
        raise MemcompileError("MC116", f"{wanted}, and this model has none", fix=fix)
    return head


def layer_regions(graph_module: fx.GraphModule) -> list[LayerRegion]:
    """Every layer that only adds to a residual stream, in graph order."""
    products: dict[int, list[WeightRegion]] = defaultdict(list)
    for region in weight_regions(graph_module):
        if region.layer is not None and region.kind == "linear":
            products[region.layer].append(region)
    found = []
    for layer, members in sorted(products.items()):
        blocks = [block for member in members if (block := addition_of(member.node)) is not None]
        if blocks:
            path = _common_path([member.path for member in members], layer)
            found.append(LayerRegion(path, path, layer, tuple(blocks), tuple(members)))
    return found


def addition_of(product: fx.Node) -> Block | None:
    """The addition that takes a product to the residual stream."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor:
            place = 1 if user.args[0] is node else 0
            stream = user.args[place]
            if user.kwargs or not isinstance(stream, fx.Node) or stream is node:
                return None
            return Block(user, place) if stream.meta["val"].shape == user.meta["val"].shape else None
        if user.target not in _BETWEEN:
            return None
        node = user
    return None


def _common_path(paths: Sequence[str], layer: int) -> str:
    """The path up to the layer's own number."""
    parts = paths[0].split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1]) if str(layer) in parts else paths[0]
