"""What a plan would do to a model: passes are tried on its graph; nothing is calibrated, lowered or run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcompile.frontend import capture
from memcompile.plan import Plan
from memcompile.program import copy_graph
from memcompile.progress import Progress
from memcompile.regions import AttentionRegion, Refusal, attention_regions
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.manager import apply, select
from memcompile.rewrite.order import ordered
from memcompile.rewrite.pass_ import Context
from memcompile.rewrite.registry import load_pass


def preview(source: str, plan: Plan, progress: Progress) -> dict[str, Any]:
    """The regions each pass would rewrite, its refusals, and the state bytes before and after.

    Raises:
        MemcompileError: MC2xx, the model; MC301, a selector matches nothing; MC109, passes contradict.
    """
    progress.stage("capture the model")
    captured = capture(source, dtype=plan.model.dtype)
    graph = copy_graph(captured.graph)
    before = _state_bytes(attention_regions(graph), {}, plan)
    predicted: dict[str, int] = {}
    tried = []
    for entry, rewrite_pass in ordered([(e, load_pass(e.name, where=e.where or None)) for e in plan.passes]):
        progress.stage(entry.name)
        matched: list[str] = []
        refusals: list[Refusal] = []
        for region, heads in select(graph, entry, rewrite_pass):
            if isinstance(heads, str):
                refusals.append(rewrite_pass.refuse(region, f"heads {entry.heads}: the layer {heads}"))
                continue
            facts = rewrite_pass.check(region, entry.config, Context(heads, plan.workload))
            if isinstance(facts, Refusal):
                refusals.append(facts)
                continue
            matched.append(region.region)
            predicted[region.region] = rewrite_pass.cost(region, facts, plan.workload).state_bytes
        # what needs calibration cannot be written yet; the rest is, so that later passes see it
        if matched and not rewrite_pass.needs_calibration(entry.config):
            apply(graph, [entry], workload=plan.workload, strict=False)
        tried.append(
            {
                "pass": entry.name,
                "where": entry.where,
                "matched": matched,
                "expect": entry.expect,
                "idle": rewrite_pass.changes_nothing(entry.config, plan.workload),
                "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in refusals],
            }
        )
    after = _state_bytes(attention_regions(graph), predicted, plan)
    return {
        "passes": tried,
        "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in captured.refusals],
        "state_bytes": {"original": before, "rewritten": after} if captured.model.causal else None,
    }


def _state_bytes(regions: Sequence[AttentionRegion], predicted: dict[str, int], plan: Plan) -> int:
    """Bytes of all caches; a region that no pass predicted (or that a pass made) is read off the graph."""
    return sum(
        predicted[region.region]
        if region.region in predicted
        else decode_cost(region, plan.workload).state_bytes
        for region in regions
    )
