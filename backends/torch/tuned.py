"""Which attention each region of a program runs on in torch, by what was measured on this machine."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from memcompile.backends.torch.timed import BACKEND, PACKAGES, TOLERANCES
from memcompile.program import Program, copy_graph
from memcompile.regions import AttentionRegion, argument, attention_regions
from memcompile.tuning import Ask, Choice, Choices, Database, Shape, Workload, choose


def tuned_choices(program: Program, workload: Workload, database: Database) -> Choices:
    """The choice for each region; one that was not tuned, or chooses its keys, keeps the default.

    Torch's own number of threads is what counts, whatever the workload says. Raises MC122.
    """
    regions = attention_regions(program.forward)
    dtype = program.model.dtype.removeprefix("torch.")
    if dtype not in TOLERANCES:
        return Choices(0, {})
    asks = [
        Ask(
            region.region, _shape(region), region.evict.kept(workload.prompt_tokens) if region.evict else None
        )
        for region in regions
        if _is_tunable(region)
    ]
    here = replace(workload, threads=torch.get_num_threads())
    return choose(database, BACKEND, asks, here, dtype=dtype, packages=PACKAGES, chunk=0)


def with_choices(step: fx.GraphModule, choices: Choices) -> fx.GraphModule:
    """The step graph with each region on what was chosen for it; a copy where that is not the default."""
    if all(choice == Choice() for choice in choices.regions.values()):
        return step
    chosen = copy_graph(step)
    for region in attention_regions(chosen):
        choice = choices.regions.get(region.region)
        if choice is not None:
            region.node.kwargs = {
                **region.node.kwargs,
                "kernel": choice.implementation,
                "key_tile": choice.key_tile,
                "splits": choice.splits,
            }
    chosen.recompile()
    return chosen


def _shape(region: AttentionRegion) -> Shape:
    return Shape(
        region.heads, region.kv_heads, region.head_dim, region.bits, region.window_tokens or 0, region.sinks,
        region.block, region.stride,
    )  # fmt: skip


def _is_tunable(region: AttentionRegion) -> bool:
    # what a choice of keys skips is known at run time only
    chooses = argument(region.node, "pattern") is not None or region.page_tokens
    return not chooses and argument(region.node, "mask") is None and bool(argument(region.node, "causal"))
