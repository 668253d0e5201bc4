"""The order of a plan's passes as data: nodes, edges and their reasons."""

from __future__ import annotations

from typing import Any

from memcompile.plan import Plan
from memcompile.rewrite.order import Loaded, order_graph, ordered
from memcompile.rewrite.registry import load_pass


def order_of(plan: Plan) -> dict[str, Any]:
    """The passes in the order they run, and what each of them waits for.

    Raises:
        MemcompileError: MC109, the passes contradict each other.
    """
    loaded: list[Loaded] = [
        (entry, load_pass(entry.name, where=entry.where or None)) for entry in plan.passes
    ]
    running: list[int] = [loaded.index(one) for one in ordered(loaded)]
    graph = order_graph(loaded)
    return {
        "passes": [{"pass": loaded[index][0].name, "where": loaded[index][0].where} for index in running],
        "edges": [
            {"before": running.index(before), "after": running.index(after), "reason": reason}
            for before, after, reason in graph.edges(data="reason")
        ],
    }
