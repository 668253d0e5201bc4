"""The heads of an attention layer as parts that can be taken out: where they are made, and where read.

Queries, keys and values are followed back to the rows of the products that make them, and what the heads give
is followed on to the columns of the product that reads it. What stands between must act on each head alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from memcompile.passes.weights.structure import ELEMENTWISE, NORMS, RESHAPES
from memcompile.passes.weights.take_out import MARK, erase_dead, smaller
from memcompile.regions import AttentionRegion, WeightRegion, argument, attention_regions, weight_regions
from memcompile.rewrite.emit import Emit
from memcompile.weights.place import operands

aten: Any = torch.ops.aten
_ALONE: Final = (
    aten.to.dtype, aten._to_copy.default, aten.neg.default, aten.contiguous.default, aten.clone.default,
)  # fmt: skip
_SPLITS: Final = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
# nodes in the way from a product to attention, each with its axis of heads; None: with the channels, the last
Axes = dict[fx.Node, int | None]


@dataclass(frozen=True)
class Source:
    """Queries, keys or values: rows of a product from `begin` on, `width` a head."""

    maker: WeightRegion
    begin: int
    width: int
    axes: Axes

    def rows(self, heads: Sequence[int]) -> torch.Tensor:
        """The product's rows that make some heads, int64."""
        return self.begin + channels_of(heads, self.width)


@dataclass(frozen=True)
class HeadsRegion:
    """The attention of a layer. sources: of queries, keys and values; after: between it and `out`.

    A group of heads that share keys and values is one unit; heads that all share one are a unit each.
    reason: why its heads cannot be taken out, where they cannot; then the rest is unknown.
    """

    attention: AttentionRegion
    sources: tuple[Source, ...] = ()
    after: tuple[fx.Node, ...] = ()
    out: WeightRegion | None = None
    reason: str = ""

    @property
    def node(self) -> fx.Node:
        return self.attention.node

    @property
    def region(self) -> str:
        return self.attention.region

    @property
    def path(self) -> str:
        return self.attention.path

    @property
    def layer(self) -> int:
        return self.attention.layer

    @property
    def products(self) -> tuple[WeightRegion, ...]:
        """The products that make heads, each once, and the one that reads them."""
        makers = {source.maker.node: source.maker for source in self.sources}
        return (*makers.values(), *(() if self.out is None else (self.out,)))

    @property
    def reader(self) -> WeightRegion:
        """The product that reads the heads; only of a region without a reason."""
        assert self.out is not None
        return self.out

    @property
    def unit_heads(self) -> int:
        """Query heads of a unit."""
        shared = self.attention.kv_heads == 1
        return 1 if shared else self.attention.heads // self.attention.kv_heads

    @property
    def units(self) -> int:
        return self.attention.heads // self.unit_heads

    @property
    def head_width(self) -> int:
        """Columns of the reading product that a head takes."""
        return self.reader.width // self.attention.heads


def head_regions(graph_module: fx.GraphModule) -> list[HeadsRegion]:
    """Every attention region, in graph order, with the products around it or the reason why not."""
    products = {r.node: r for r in weight_regions(graph_module) if r.kind == "linear"}
    return [_read(attention, products) for attention in attention_regions(graph_module)]


def _read(attention: AttentionRegion, products: dict[fx.Node, WeightRegion]) -> HeadsRegion:
    node = attention.node
    for name, what in (("k_scale", "its cache is quantised"), ("pattern", "its heads choose their keys")):
        if argument(node, name) is not None:
            return HeadsRegion(attention, reason=f"{what} already, one value a head")
    mask = argument(node, "mask")
    if isinstance(mask, fx.Node) and mask.meta["val"].ndim > 2 and mask.meta["val"].shape[-3] != 1:
        return HeadsRegion(attention, reason="its mask has values of its own for every head")
    sources = []
    for name, what in (("q", "queries"), ("k", "keys"), ("v", "values")):
        tensor = argument(node, name)
        trace = _Trace(products, what, int(tensor.meta["val"].shape[1]), int(tensor.meta["val"].shape[3]))
        if reason := trace.heads(tensor, 1):
            return HeadsRegion(attention, reason=reason)
        assert trace.maker is not None
        sources.append(Source(trace.maker, trace.begin, trace.width, trace.axes))
    inside = {n for source in sources for n in (*source.axes, source.maker.node)}
    if any(user not in inside and user is not node for one in inside for user in one.users):
        return HeadsRegion(attention, reason="something else reads its queries, keys or values too")
    after, out, reason = _follow(attention, products)
    return HeadsRegion(attention, tuple(sources), after, out, reason)


@dataclass
class _Trace:
    """Follows one input of attention back to the product that makes it; each step gives a reason, or ""."""

    products: dict[fx.Node, WeightRegion]
    what: str
    count: int
    width: int
    maker: WeightRegion | None = None
    begin: int = 0
    axes: Axes = field(default_factory=dict)

    def heads(self, node: fx.Node, axis: int) -> str:
        """A node whose axis `axis` is that of the heads."""
        if node in self.axes:
            return "" if self.axes[node] == axis else self._unknown(node)
        self.axes[node] = axis
        arguments: Any = node.args
        value, x, target = node.meta.get("val"), arguments[0] if arguments else None, node.target
        if not isinstance(x, fx.Node | list) or not isinstance(value, torch.Tensor):
            return self._unknown(node)
        last = value.ndim - 1
        if target in ELEMENTWISE:
            return self._operands(node, axis, last)
        if target is aten.cat.default and isinstance(x, list) and argument(node, "dim") % value.ndim != axis:
            return next((reason for part in x if (reason := self.heads(part, axis))), "")
        if not isinstance(x, fx.Node):
            return self._unknown(node)
        if target is aten.transpose.int:
            first, second = (int(dim) % value.ndim for dim in arguments[1:3])
            return self.heads(x, {first: second, second: first}.get(axis, axis))
        if target is aten.permute.default:
            return self.heads(x, int(arguments[1][axis]) % value.ndim)
        alone = target in (*_ALONE, torch.ops.memcompile.rotary.default) or _norms_last(node)
        if alone and axis != last:
            return self.heads(x, axis)
        if target is aten.slice.Tensor and int(arguments[1]) % value.ndim != axis:
            return self.heads(x, axis)
        given = x.meta["val"].shape
        splits = (
            axis == last - 1 and given[-1] == self.count * self.width == value.shape[axis] * value.shape[-1]
        )
        return self._flat(x, 0) if target in RESHAPES and splits else self._unknown(node)

    def _operands(self, node: fx.Node, axis: int, last: int) -> str:
        for operand in node.all_input_nodes:
            # a size has no shape, and no heads
            shape = getattr(operand.meta.get("val"), "shape", ())
            place = axis - last - 1 + len(shape)
            if place >= 0 and shape[place] != 1 and (reason := self.heads(operand, place)):
                return reason
        return ""

    def _flat(self, node: fx.Node, begin: int) -> str:
        """A node that holds the heads side by side on its last axis, from `begin` on."""
        if node in self.products:
            same = self.maker is None or (self.maker.node is node and self.begin == begin)
            self.maker, self.begin = self.products[node], begin
            return "" if same else self._unknown(node)
        self.axes[node] = None
        arguments: Any = node.args
        x, target = arguments[0] if arguments else None, node.target
        if target in NORMS:
            return f"its {self.what} are normalised over all heads together"
        if not isinstance(x, fx.Node):
            return self._unknown(node)
        if target is operator.getitem and x.target in _SPLITS:
            self.axes[x] = None
            return self._split(x, int(arguments[1]), begin)
        value = node.meta["val"]
        if target is aten.slice.Tensor and len(arguments) < 5 and arguments[1] in (-1, value.ndim - 1):
            first = int(arguments[2] or 0) if len(arguments) > 2 else 0
            return self._flat(x, begin + first % x.meta["val"].shape[-1])
        keeps = x.meta["val"].shape[-1] == value.shape[-1]
        alone = target in _ALONE or (target in ELEMENTWISE and node.all_input_nodes == [x])
        return self._flat(x, begin) if keeps and (target in RESHAPES or alone) else self._unknown(node)

    def _split(self, node: fx.Node, index: int, begin: int) -> str:
        arguments: Any = node.args
        x = arguments[0]
        value = x.meta["val"]
        dim = int(arguments[2] if len(arguments) > 2 else argument(node, "dim"))
        if dim % value.ndim != value.ndim - 1:
            return self._unknown(node)
        parts = [int(part.shape[-1]) for part in node.meta["val"]]
        return self._flat(x, begin + sum(parts[:index]))

    def _unknown(self, node: fx.Node) -> str:
        return f"its {self.what} come through {node.target}, which is not understood there"


def _norms_last(node: fx.Node) -> bool:
    """Whether a node normalises its last axis, and that alone."""
    arguments: Any = node.args
    if node.target is aten.layer_norm.default:
        return len(arguments[1]) == 1
    return node.target in NORMS and bool(arguments[1].meta["val"].ndim == 1)


def _follow(
    attention: AttentionRegion, products: dict[fx.Node, WeightRegion]
) -> tuple[tuple[fx.Node, ...], WeightRegion | None, str]:
    """What stands between attention and the product that reads its heads; and why it cannot be followed."""
    node, axis = attention.node, 1
    if len(node.users) != 1 or next(iter(node.users)).args[1] != 0:
        return (), None, "its state is already threaded through the graph"
    after: list[fx.Node] = []
    flat = False
    while True:
        if len(node.users) != 1:
            return (), None, "something else reads what its heads give"
        (user,) = node.users
        arguments: Any = user.args
        if user in products and flat and operands(user)[0] is node:
            return tuple(after), products[user], ""
        value = user.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return (), None, "what its heads give leaves the model"
        if user.target is operator.getitem or user.target in _ALONE:
            pass
        elif not flat and user.target is aten.transpose.int:
            first, second = (int(dim) % value.ndim for dim in arguments[1:3])
            axis = {first: second, second: first}.get(axis, axis)
        elif not flat and user.target is aten.permute.default:
            axis = [int(dim) % value.ndim for dim in arguments[1]].index(axis)
        elif user.target in RESHAPES and value.shape[-1] == _flat_width(node, axis, flat):
            flat = True
        else:
            return (), None, f"{user.target} stands between its heads and the product that reads them"
        after.append(user)
        node = user


def _flat_width(node: fx.Node, axis: int, flat: bool) -> int | None:
    shape = node.meta["val"].shape
    if flat:
        return int(shape[-1])
    return int(shape[-2] * shape[-1]) if axis == len(shape) - 2 else None


def drop_heads(region: HeadsRegion, queries: Sequence[int], out: torch.Tensor | None, emit: Emit) -> None:
    """Leave the query heads `queries`, whole units of them, and let `out` [M,columns] read them if given."""
    attention, node, reader = region.attention, region.node, region.reader
    group = attention.heads // attention.kv_heads
    groups = sorted({query // group for query in queries})
    emit.decide(
        f"{len(queries)} of {attention.heads} query heads and {len(groups)} of {attention.kv_heads} "
        "key/value heads stay"
    )
    before = [argument(node, name) for name in ("q", "k", "v")]
    kept = (queries, groups, groups)
    inputs = [_again(source, heads, emit, node) for source, heads in zip(region.sources, kept, strict=True)]
    emit.update(node, **dict(zip(("q", "k", "v"), inputs, strict=True)))
    made: dict[fx.Node, fx.Node] = {}
    columns = channels_of(queries, region.head_width)
    for one in region.after:
        shape = _with_size(one, -1, len(columns)) if one.target in RESHAPES else None
        made[one] = _copy(one, made, shape, emit, reader.node)
    weight = reader.stored
    assert weight is not None
    kept_weight = _taken(weight, columns, 1) if out is None else out.to(weight.dtype)
    last = smaller(reader, kept_weight, made[operands(reader.node)[0]], emit)
    emit.mark(node, MARK, "heads")
    emit.replace_uses(reader.node, last)
    erase_dead(reader.node, emit)
    for one in before:
        erase_dead(one, emit)


def _again(source: Source, heads: Sequence[int], emit: Emit, attention: fx.Node) -> fx.Node:
    """The way from a product to attention once more, for some heads."""
    rows = source.rows(heads)
    weight = source.maker.stored
    assert weight is not None
    product = smaller(
        source.maker, _taken(weight, rows, 0), operands(source.maker.node)[0], emit, rows=rows
    )  # fmt: skip
    made = {source.maker.node: product}
    order = {node: index for index, node in enumerate(attention.graph.nodes)}
    for node in sorted(source.axes, key=order.__getitem__):
        axis, shape = source.axes[node], None
        x = node.args[0]
        if (
            axis is None
            and isinstance(x, fx.Node)
            and (node.target in (*_SPLITS, aten.slice.Tensor, operator.getitem))
        ):
            # the product makes nothing else any more
            made[node] = made[x]
            continue
        if node.target in RESHAPES:
            shape = _with_size(node, -1, len(rows)) if axis is None else _with_size(node, axis, len(heads))
        made[node] = _copy(node, made, shape, emit, attention)
    return made[next(iter(source.axes))]


def _copy(
    node: fx.Node, made: dict[fx.Node, fx.Node], shape: list[Any] | None, emit: Emit, before: fx.Node
) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: made.get(n, n))
    if shape is not None:
        args = (args[0], shape)
    assert callable(node.target)
    return emit.call(node.target, *args, before=before, like=node, **kwargs)


def _with_size(reshape: fx.Node, axis: int, size: int) -> list[Any]:
    """The sizes of a reshape with another one at `axis`; one that is left open stays open."""
    sizes: list[Any] = list(reshape.args[1])  # type: ignore[arg-type]
    sizes[axis] = sizes[axis] if sizes[axis] == -1 else size
    return sizes


def channels_of(heads: Sequence[int], width: int) -> torch.Tensor:
    """The channels of some heads, side by side, int64."""
    return (torch.tensor(heads).unsqueeze(-1) * width + torch.arange(width)).flatten()


def _taken(weight: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """Rows (axis 0) or columns of a weight in ascending order; of a weight on disk, nothing is read."""
    ends = (index.diff() != 1).nonzero().flatten() + 1
    runs = torch.tensor_split(index, ends)
    return torch.cat([weight.narrow(axis, int(run[0]), len(run)) for run in runs], axis)
