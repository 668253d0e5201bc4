"""Turn a captured whole-sequence graph into a step graph: every cache an input and an output.

The law: `step(a + b) == step(b, state after step(a))` for every split, and `step(everything) == forward`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.program.program import PLAIN_GROUP, PositionGroup, Program, StateSpec
from memcompile.regions import (
    AttentionRegion,
    FfnRegion,
    argument,
    attention_regions,
    copy_graph,
    ffn_regions,
)


def assign_groups(regions: list[AttentionRegion]) -> tuple[tuple[PositionGroup, ...], dict[str, str]]:
    """Group regions whose caches hold the same tokens; gives the groups and each region's group name."""
    groups: dict[tuple[object, ...], PositionGroup] = {}
    assigned: dict[str, str] = {}
    for region in regions:
        window = region.window_tokens or 0
        key = (window, region.sinks, region.block, region.stride, region.evict)
        if key not in groups:
            groups[key] = PositionGroup(
                _group_name(region, groups.values()),
                window,
                region.sinks,
                region.block,
                region.stride,
                region.evict,
            )
        assigned[region.region] = groups[key].name
    return tuple(groups.values()), assigned


def _group_name(region: AttentionRegion, taken: object) -> str:
    names = {g.name for g in taken}  # type: ignore[attr-defined]
    if region.evict is not None:
        base = f"evict_{region.evict.scorer.name}"
    elif region.window_tokens:
        base = f"window_{region.window_tokens}_{region.sinks}"
    else:
        base = PLAIN_GROUP
    base = "".join(c if c.isalnum() else "_" for c in base)
    name, count = base, 1
    while name in names:
        count += 1
        name = f"{base}_{count}"
    return name


def make_step(program: Program) -> Program:
    """Add `step` to a causal program, with its states and groups.

    Raises MC203 when the graph has attention that cannot be continued (not causal, or masked at run time).
    """
    graph_module = copy_graph(program.forward)
    regions = attention_regions(graph_module)
    for region in regions:
        if region.mask.kind not in ("causal", "sliding_window"):
            raise MemcompileError(
                "MC203",
                f"attention {region.path or region.region} has a {region.mask.kind} mask, "
                "so decoding cannot continue it token by token",
                where=region.path,
                fix="leave attention_mask out of the example inputs: prompts are padded without it"
                if region.mask.kind == "padding"
                else "use a model whose masks follow from positions alone (causal, or a sliding window)",
            )
    groups, assigned = assign_groups(regions)
    counted = _counted_layers(graph_module, regions)
    states = tuple(_state(region, assigned[region.region], counted) for region in regions)
    graph = graph_module.graph
    placeholders = {n.target: n for n in graph.nodes if n.op == "placeholder"}
    token_input = placeholders.get("input_ids") or next(iter(placeholders.values()))
    last = list(placeholders.values())[-1]
    with graph.inserting_after(last):
        added = _Placeholders(graph_module, last)
    if "position_ids" not in placeholders:
        positions = added.make("position_ids", _like_tokens(token_input))
        _rewire_aranges(graph_module, token_input, positions)
    logit_positions = added.make("logit_positions", None)
    tables = {g.name: added.make(g.input_name, None) for g in groups}
    past = {
        s.region: (added.make(s.names().key_in, None), added.make(s.names().value_in, None)) for s in states
    }
    observed = {s.region: added.make(str(s.names().observed_in), None) for s in states if s.observe_tokens}
    bounds = {s.region: added.make(str(s.names().bounds_in), None) for s in states if s.page_tokens}
    neurons = {s.region: added.make(str(s.names().neurons_in), None) for s in states if s.neurons}
    outputs: list[fx.Node] = []
    seen: list[fx.Node] = []
    bounded: list[fx.Node] = []
    for region, state in zip(regions, states, strict=True):
        node = region.node
        node.kwargs = {
            **node.kwargs,
            "past_k": past[state.region][0],
            "past_v": past[state.region][1],
            "positions": tables[state.group],
        }
        if state.region in bounds:
            bounded.append(_bound_pages(node, bounds[state.region], state))
        following = node.next
        with graph.inserting_before(following):
            outputs += [graph.call_function(operator.getitem, (node, i)) for i in (1, 2)]
            if state.region in observed:
                seen.append(
                    graph.call_function(
                        torch.ops.memcompile.observe.default,
                        (node.args[0], observed[state.region], tables[state.group], state.observe_tokens),
                    )
                )
    for ffn in ffn_regions(graph_module):
        if 0 < ffn.keep < ffn.neurons:
            ffn.node.kwargs = {**ffn.node.kwargs, "choosing": True}
    totals = [
        _count_neurons(counted[s.region], neurons[s.region], tables[s.group]) for s in states if s.neurons
    ]
    output = next(n for n in graph.nodes if n.op == "output")
    flat = output.args[0]
    assert isinstance(flat, (tuple, list))
    assert program.logits_index is not None
    logits = flat[program.logits_index]
    assert isinstance(logits, fx.Node)
    chosen = _select_rows(graph_module, logits, logit_positions)
    output.args = ((chosen, *outputs, *seen, *bounded, *totals),)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return replace(program, step=graph_module, states=states, groups=groups)


def _counted_layers(graph_module: fx.GraphModule, regions: Sequence[AttentionRegion]) -> dict[str, FfnRegion]:
    """The feed-forward layers whose neurons are counted, by the first attention region of their layer."""
    first: dict[int, str] = {}
    for region in regions:
        first.setdefault(region.layer, region.region)
    found: dict[str, FfnRegion] = {}
    for ffn in ffn_regions(graph_module):
        if not ffn.counted:
            continue
        place = None if ffn.layer is None else first.get(ffn.layer)
        if place is None or place in found:
            raise MemcompileError(
                "MC203",
                f"{ffn.path}: its neurons are counted, but its layer has no attention of its own",
                where=ffn.path,
                fix="choose neurons for every token (when: token) in this layer, or leave it out",
            )
        found[place] = ffn
    return found


def _count_neurons(ffn: FfnRegion, past: fx.Node, positions: fx.Node) -> fx.Node:
    """Let a feed-forward layer choose by counts that the call's tokens were added to; gives their node."""
    node = ffn.node
    with node.graph.inserting_before(node):
        counts = node.graph.call_function(
            torch.ops.memcompile.neuron_counts.default,
            (argument(node, "x"), argument(node, "gate"), past, positions),
            {"activation": ffn.activation, "token_keep": int(node.meta["counted"])},
        )
    node.kwargs = {**node.kwargs, "counts": counts}
    return counts


def _bound_pages(node: fx.Node, past: fx.Node, state: StateSpec) -> fx.Node:
    """Let attention choose pages by bounds that the new keys were added to; gives the bounds' node."""
    with node.graph.inserting_before(node):
        bounds = node.graph.call_function(
            torch.ops.memcompile.page_bounds.default,
            (argument(node, "k"), past, node.kwargs["positions"], argument(node, "k_scale")),
            {"page_tokens": state.page_tokens, "bits": state.bits},
        )
    node.kwargs = {**node.kwargs, "bounds": bounds}
    return bounds


def without_choices(program: Program) -> Program:
    """The program that looks at every key and computes every neuron while decoding.

    For a backend that has no operators to choose with.
    """
    if not program.decodes_alone:
        return program
    forward = copy_graph(program.forward)
    for region in attention_regions(forward):
        region.node.kwargs = {**region.node.kwargs, "page_tokens": 0}
    for ffn in ffn_regions(forward):
        if ffn.keep:
            # a budget of all neurons is no choice
            ffn.node.kwargs = {**ffn.node.kwargs, "keep": ffn.neurons}
            ffn.node.meta.pop("counted", None)
    forward.recompile()
    return make_step(replace(program, forward=forward))


class _Placeholders:
    """Adds placeholders after the existing ones, in order."""

    def __init__(self, graph_module: fx.GraphModule, last: fx.Node) -> None:
        self._graph = graph_module.graph
        self._last = last

    def make(self, name: str, value: torch.Tensor | None) -> fx.Node:
        with self._graph.inserting_after(self._last):
            node = self._graph.placeholder(name)
        if value is not None:
            node.meta["val"] = value
        self._last = node
        return node


def _state(region: AttentionRegion, group: str, counted: Mapping[str, FfnRegion]) -> StateSpec:
    value = region.node.args[1].meta["val"]  # type: ignore[union-attr]
    return StateSpec(
        region=region.region,
        layer=region.layer,
        group=group,
        heads=region.heads,
        kv_heads=region.kv_heads,
        head_dim=region.head_dim,
        bits=region.bits,
        dtype=value.dtype,
        observe_tokens=region.evict.observe_tokens if region.evict else 0,
        page_tokens=region.page_tokens,
        neurons=counted[region.region].neurons if region.region in counted else 0,
    )


def _like_tokens(token_input: fx.Node) -> torch.Tensor | None:
    value = token_input.meta.get("val")
    return value if isinstance(value, torch.Tensor) and value.dtype == torch.int64 else None


def _rewire_aranges(graph_module: fx.GraphModule, token_input: fx.Node, position_ids: fx.Node) -> None:
    """Positions that a graph counts itself, `arange(number of tokens)`, come from `position_ids` instead.

    The graph's own arange has no batch axis, so its first row of positions stands for all rows: such a model
    steps rows of equal length only.
    """
    graph = graph_module.graph
    tokens = token_input.meta["val"].shape[1]
    row: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op != "call_function" or "arange" not in str(node.target):
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.shape[0] != tokens:
            continue
        if row is None:
            with graph.inserting_after(position_ids):
                row = graph.call_function(torch.ops.aten.select.int, (position_ids, 0, 0))
                row.meta["val"] = value
        replacement = row
        if value.dtype != torch.int64:
            with graph.inserting_after(row):
                replacement = graph.call_function(torch.ops.aten.to.dtype, (row, value.dtype))
                replacement.meta["val"] = value
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


# operators that act on each token row alone, so that rows can be chosen before them instead of after
_ROW_WISE = {
    torch.ops.aten.linear.default, torch.ops.aten.tanh.default, torch.ops.memcompile.rms_norm.default,
    torch.ops.memcompile.quantized_linear.default,
    torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.layer_norm.default,
    torch.ops.aten.native_layer_norm.default,
}  # fmt: skip
_ROW_WISE_WITH_SCALAR = {
    torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor,
    torch.ops.aten.mul.Scalar, torch.ops.aten.div.Scalar,
}  # fmt: skip


def _select_rows(graph_module: fx.GraphModule, logits: fx.Node, rows: fx.Node) -> fx.Node:
    """Choose token rows as early as possible: before the language model head and its final norm."""
    at = logits
    while True:
        source = at.args[0] if at.args else None
        if not isinstance(source, fx.Node) or len(at.users) > (1 if at is not logits else len(at.users)):
            break
        row_wise = at.target in _ROW_WISE
        scaled = at.target in _ROW_WISE_WITH_SCALAR and not isinstance(at.args[1], fx.Node)
        sliced = _is_whole_slice(at)
        if not (row_wise or scaled or sliced) or source.meta["val"].ndim != 3:
            break
        at = source
    graph = graph_module.graph
    users = list(at.users)
    width = at.meta["val"].shape[2]
    with graph.inserting_after(at):
        length = graph.call_function(torch.ops.aten.sym_size.int, (at, 1))
    with graph.inserting_after(length):
        negative = graph.call_function(torch.ops.aten.lt.Scalar, (rows, 0))
    with graph.inserting_after(negative):
        wrapped = graph.call_function(torch.ops.aten.add.Tensor, (rows, length))
    with graph.inserting_after(wrapped):
        index = graph.call_function(torch.ops.aten.where.self, (negative, wrapped, rows))
    with graph.inserting_after(index):
        column = graph.call_function(torch.ops.aten.unsqueeze.default, (index, -1))
    with graph.inserting_after(column):
        wide = graph.call_function(torch.ops.aten.expand.default, (column, [-1, -1, width]))
    with graph.inserting_after(wide):
        chosen = graph.call_function(torch.ops.aten.gather.default, (at, 1, wide))
    for user in users:
        user.replace_input_with(at, chosen)
    return chosen if at is logits else logits


def _is_whole_slice(node: fx.Node) -> bool:
    """A slice that keeps everything, such as `hidden[:, 0:]`."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    start = node.args[2] if len(node.args) > 2 else 0
    end = node.args[3] if len(node.args) > 3 else None
    return (
        start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**31)) and len(node.args) < 5
    )
