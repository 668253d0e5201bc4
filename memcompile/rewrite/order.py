"""The order of passes: a graph of what each needs, settles and invalidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import networkx as nx

from memcompile.errors import MemcompileError
from memcompile.rewrite.entry import PassEntry
from memcompile.rewrite.pass_ import Pass

# what holds of every program before any pass ran
AT_THE_START: Final = frozenset({"float_cache", "float_weights", "whole_cache"})

Loaded = tuple[PassEntry, Pass[Any, Any, Any]]


def order_graph(loaded: Sequence[Loaded]) -> Any:
    """The `networkx.DiGraph` whose nodes are indexes into `loaded`; each edge has a `reason`.

    Two entries of one pass keep the order of the plan.
    """
    graph = nx.DiGraph()
    for index, (entry, _) in enumerate(loaded):
        graph.add_node(index, name=entry.name, where=entry.where)
    for first, (entry, one) in enumerate(loaded):
        for second, (other_entry, other) in enumerate(loaded):
            if first == second:
                continue
            if entry.name == other_entry.name:
                if first < second:
                    graph.add_edge(first, second, reason="the order of the plan")
                continue
            wanted = other.order.needs | other.order.after
            if settled := one.order.provides & wanted:
                graph.add_edge(first, second, reason=f"settles {_words(settled)}")
            spoiled = (other.order.invalidates & (one.order.needs | one.order.after)) - other.order.provides
            if spoiled:
                graph.add_edge(first, second, reason=f"needs {_words(spoiled)}, which {other.name} ends")
    return graph


def ordered(loaded: Sequence[Loaded]) -> list[Loaded]:
    """The entries in the order they run; where nothing decides, the order of the plan.

    Raises:
        MemcompileError: MC109, the passes contradict each other.
    """
    provided = AT_THE_START.union(*(one.order.provides for _, one in loaded))
    for entry, one in loaded:
        if missing := one.order.needs - provided:
            raise MemcompileError(
                "MC109",
                f"{entry.name} needs {_words(missing)}, and no pass of the plan provides it",
                where=entry.where or None,
                fix="add a pass that does, or leave this one out",
            )
    graph = order_graph(loaded)
    try:
        order = list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible as error:
        raise _contradiction(graph, loaded) from error
    return [loaded[index] for index in order]


def _contradiction(graph: Any, loaded: Sequence[Loaded]) -> MemcompileError:
    cycle = nx.find_cycle(graph)
    steps = []
    for before, after in ((edge[0], edge[1]) for edge in cycle):
        reason = graph.edges[before, after]["reason"]
        steps.append(f"{loaded[before][0].name} must run before {loaded[after][0].name} ({reason})")
    places = ", ".join(loaded[edge[0]][0].where for edge in cycle if loaded[edge[0]][0].where)
    return MemcompileError(
        "MC109", "; ".join(steps), where=places or None, fix="leave one of these passes out of the plan"
    )


def _words(facts: frozenset[str]) -> str:
    return ", ".join(sorted(facts))
