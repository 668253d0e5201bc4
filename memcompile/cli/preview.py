"""What a plan would do to a model: passes are tried on its graph; nothing is calibrated, lowered or run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.plan import Plan
from memcompile.program import copy_graph
from memcompile.progress import Progress
from memcompile.regions import Refusal
from memcompile.rewrite.manager import apply, select
from memcompile.rewrite.order import Loaded, ordered
from memcompile.rewrite.pass_ import Context
from memcompile.rewrite.registry import load_pass
from memcompile.rewrite.step_bytes import step_bytes


def preview(source: str, plan: Plan, progress: Progress) -> dict[str, Any]:
    """The regions each pass would rewrite, its refusals, and the state bytes before and after.

    What would end `optimize` is told in the pass's `problem`, and the other passes are tried all the same.

    Raises:
        MemcompileError: MC2xx, the model is not understood; MC109, passes contradict each other.
    """
    progress.stage("capture the model")
    wanted = plan.model
    captured = capture(source, dtype=wanted.dtype, weights=wanted.weights, activations=wanted.activations)
    graph = copy_graph(captured.graph)
    original = step_bytes(graph, plan.workload)
    predicted: dict[str, int] = {}
    tried = []
    loaded: list[Loaded] = [
        (entry, load_pass(entry.name, where=entry.where or None)) for entry in plan.passes
    ]
    for one in ordered(loaded):
        progress.stage(one[0].name)
        found, state_bytes = _try(graph, one, plan)
        predicted |= state_bytes
        tried.append(found)
    rewritten = step_bytes(graph, plan.workload, predicted)
    causal = captured.model.causal
    return {
        "passes": tried,
        "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in captured.refusals],
        "state_bytes": {"original": original.state, "rewritten": rewritten.state} if causal else None,
        "step_bytes": {
            "original": original.as_dict(),
            "rewritten": rewritten.as_dict(),
            "bound": original.sentence(),
        }
        if causal
        else None,
    }


def first_problem(previewed: dict[str, Any]) -> MemcompileError | None:
    """The error that `optimize` would end with, as far as a preview can tell."""
    for entry in previewed["passes"]:
        if (problem := entry["problem"]) is not None:
            return MemcompileError(
                problem["code"], problem["message"], where=problem["where"], fix=problem["fix"]
            )
    return None


def _try(graph: Any, one: Loaded, plan: Plan) -> tuple[dict[str, Any], dict[str, int]]:
    """Check one pass on the graph, and rewrite it if that needs no calibration."""
    entry, rewrite_pass = one
    matched: dict[str, int] = {}
    refusals: list[Refusal] = []
    problem: MemcompileError | None = None
    try:
        selected = select(graph, entry, rewrite_pass)
    except MemcompileError as error:
        selected, problem = [], error
    for region, heads in selected:
        if isinstance(heads, str):
            refusals.append(rewrite_pass.refuse(region, f"heads {entry.heads}: the layer {heads}"))
            continue
        facts = rewrite_pass.check(region, entry.config, Context(heads, plan.workload))
        if isinstance(facts, Refusal):
            refusals.append(facts)
        else:
            matched[region.region] = rewrite_pass.cost(region, facts, plan.workload).state_bytes
    # what needs calibration cannot be written yet; the rest is, so that later passes see it
    needs_text = rewrite_pass.needs_calibration(entry.config) or rewrite_pass.recovers(entry.config)
    if matched and not needs_text:
        apply(graph, [entry], workload=plan.workload, strict=False)
    problem = problem or _problem(one, plan, len(matched), refusals)
    told = {
        "pass": entry.name,
        "where": entry.where,
        "matched": list(matched),
        "expect": entry.expect,
        "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in refusals],
        # for a selector that matched nothing, the fix has the nearest names
        "nearest": problem.fix if problem is not None and problem.code == "MC301" else None,
        "problem": None if problem is None else problem.as_dict(),
    }
    return told, matched


def _problem(one: Loaded, plan: Plan, matched: int, refusals: Sequence[Refusal]) -> MemcompileError | None:
    entry, rewrite_pass = one
    if (idle := rewrite_pass.changes_nothing(entry.config, plan.workload)) is not None:
        fix = "lower the budget, raise the workload's sizes, or leave the pass out"
        return MemcompileError("MC305", f"{entry.name}: {idle}", where=entry.where, fix=fix)
    if not matched:
        why = refusals[0].reason if refusals else "the model has no region that was recognised"
        fix = "change layers:, or leave the pass out"
        return MemcompileError(
            "MC303", f"{entry.name}: refused everywhere: {why}", where=entry.where, fix=fix
        )
    if entry.expect is not None and matched < entry.expect:
        message = f"{entry.name}: expect is {entry.expect}, and {matched} regions would be rewritten"
        fix = f"select more layers, or set expect: {matched}"
        return MemcompileError("MC302", message, where=entry.where, fix=fix)
    return None
