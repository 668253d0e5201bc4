"""Which operator each attention region of a lowered step runs on, by what was measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import onnx_ir as ir

from memcompile.artifact.manifest import GroupEntry, StateEntry
from memcompile.backends.onnxruntime.finish import (
    BOUNDS,
    MEASURED,
    PAST_K,
    PATTERN,
    all_inputs,
    attention_nodes,
    can_run,
    with_kernels,
)
from memcompile.backends.onnxruntime.timed import BACKEND, PACKAGES
from memcompile.kernels import TYPES
from memcompile.progress import SILENT, Progress
from memcompile.tuning import KERNELS, Ask, Choices, Database, Shape, Workload, choose
from memcompile.tuning.crossover import Products, Rule, Switch, find_switch

# distinct rules that are measured for one artifact
MOST_RULES: Final = 3
_SIZES: Final = ("bits", "window", "sinks", "block", "stride")


def tuned_choices(
    model: ir.Model,
    states: Sequence[StateEntry],
    groups: Sequence[GroupEntry],
    workload: Workload | None,
    database: Database,
    chunk: int,
) -> Choices:
    """The choice for each region of a traced model; `chunk` is the default chunk of prompts.

    Without a workload, and for regions that were not tuned, it is the default: our kernels, parameters
    automatic. Raises MC122.
    """
    if workload is None:
        return Choices(chunk, {})
    held = _held_tokens(states, groups, workload)
    nodes = [node for node in attention_nodes(model) if region_of(node) and _is_tunable(node)]
    asks = [Ask(region_of(node), shape_of(node), held.get(region_of(node))) for node in nodes]
    # a model has one type
    dtype = next((products_of(node) for node in nodes), "float32")
    return choose(database, BACKEND, asks, workload, dtype=dtype, packages=PACKAGES, chunk=chunk)


def measure_switches(
    model: ir.Model, workload: Workload | None, database: Database, progress: Progress = SILENT
) -> list[dict[str, Any]]:
    """Set in the traced model from how many keys on regions choose among them; gives the decisions.

    Each rule is measured once on this machine. Where more than `MOST_RULES` differ, as when every layer has
    patterns of its own, some stand for all, and all begin where the last of them does.
    Without a workload the defaults stay. Raises MC122.
    """
    decisions: list[dict[str, Any]] = []
    for measured, begin in zip(MEASURED, ("pattern_from", "page_from"), strict=True):
        rules: dict[Rule, list[ir.Node]] = {}
        for node in attention_nodes(model):
            if can_run(node) and node.attributes.get_int(measured, 0) != 0:
                rules.setdefault(_rule_of(node, measured), []).append(node)
        if not rules:
            continue
        nodes = [node for group in rules.values() for node in group]
        regions = ", ".join(region_of(node) for node in nodes)
        found = None if workload is None else _switch(list(rules), workload, database, progress)
        if found is None:
            tokens = nodes[0].attributes.get_int(begin, 0)
            text = f"keys are chosen from {tokens:,} on, the default, not measured here"
        else:
            text = found.sentence()
            for node in nodes:
                node.attributes.add(ir.AttrInt64(begin, found.dense_tokens))
        decisions.append({"tuned": "attention.sparse", "regions": regions, "decision": text})
    return decisions


def _switch(
    rules: Sequence[Rule], workload: Workload, database: Database, progress: Progress
) -> Switch | None:
    most = workload.prompt_tokens + workload.new_tokens
    step = -(-len(rules) // MOST_RULES)
    found = [
        find_switch(rule, database, most_tokens=most, threads=workload.threads, progress=progress)
        for rule in rules[::step]
    ]
    switches = [switch for switch in found if switch is not None]
    return max(switches, key=lambda switch: switch.dense_tokens) if len(switches) == len(found) else None


def _rule_of(node: ir.Node, measured: str) -> Rule:
    shape, names = shape_of(node), node.attributes
    sizes = (shape.heads, shape.kv_heads, shape.width, shape.bits)
    if measured == "measure_page_from":
        return Rule(*sizes, page_tokens=names.get_int("page_tokens"), page_keep=names.get_int("page_keep"))
    pattern = all_inputs(node)[PATTERN]
    assert pattern is not None
    stored = ir.convenience.get_const_tensor(pattern)
    assert stored is not None
    rows = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in stored.numpy())
    return Rule(*sizes, pattern=rows, block=names.get_int("block_tokens"), products=products_of(node))


def with_choices(model: ir.Model, choices: Choices) -> ir.Model:
    """A copy of the traced model in which each region runs on what was chosen for it."""
    for node in attention_nodes(model):
        choice = choices.regions.get(region_of(node))
        if choice is not None:
            node.attributes.add(ir.AttrInt64("key_tile", choice.key_tile))
            node.attributes.add(ir.AttrInt64("splits", choice.splits))
    others = {region for region, choice in choices.regions.items() if choice.implementation != KERNELS}
    return with_kernels(model, lambda node: region_of(node) not in others)


def region_of(node: ir.Node) -> str:
    """The region that a traced node computes."""
    return node.attributes.get_string("region", "")


def products_of(node: ir.Node) -> Products:
    """The type that the kernels may round to what a traced node multiplies."""
    return "bfloat16" if node.attributes.get_int("products", 0) == TYPES["bfloat16"] else "float32"


def shape_of(node: ir.Node) -> Shape:
    """The sizes of a traced node, as they are tuned."""
    names = node.attributes
    past = node.inputs[PAST_K]
    assert past is not None
    assert past.shape is not None
    bits, stored = names.get_int("bits", 0), past.shape[3]
    assert isinstance(stored, int)
    return Shape(
        names.get_int("num_heads"),
        names.get_int("kv_num_heads"),
        stored * 2 if bits == 4 else stored,
        **{name: names.get_int(name, 0) for name in _SIZES},
    )


def _is_tunable(node: ir.Node) -> bool:
    # a choice of keys is no size: what it skips is known at run time only; and the runtime makes none
    chooses = any(all_inputs(node)[place] is not None for place in (PATTERN, BOUNDS))
    return can_run(node) and not chooses and bool(node.attributes.get_int("causal", 1))


def _held_tokens(
    states: Sequence[StateEntry], groups: Sequence[GroupEntry], workload: Workload
) -> dict[str, int]:
    """Tokens that the caches of evicted groups keep of a prompt."""
    kept: dict[str, int] = {}
    for group in groups:
        if group.evict is not None:
            tokens = group.evict.keep_tokens or int((group.evict.keep_fraction or 1) * workload.prompt_tokens)
            kept[group.name] = max(1, min(tokens, workload.prompt_tokens))
    return {state.region: kept[state.group] for state in states if state.group in kept}
