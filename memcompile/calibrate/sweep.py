"""Run a graph node by node over all calibration windows at once.

Every window reaches a node before any goes on to the next one, so what is decided at a node (how its weight
is quantised, say) is decided on all the data, and what comes after sees the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.progress import SILENT, Progress

# the node, and for every window the values of its arguments; gives the node's value in every window
Visit = Callable[[fx.Node, Sequence[tuple[Any, ...]]], list[Any]]


def sweep(
    graph_module: fx.GraphModule,
    windows: Sequence[Mapping[str, torch.Tensor]],
    wanted: Collection[fx.Node],
    visit: Visit,
    progress: Progress = SILENT,
) -> None:
    """Call `visit` at each of the wanted nodes, in graph order; what they do not depend on is not run.

    Raises:
        MemcompileError: MC205, a window lacks an input of the graph.
    """
    needed = _with_ancestors(wanted)
    last_use = _last_uses(graph_module, needed)
    windows_of = [fx.Interpreter(graph_module, garbage_collect_values=False) for _ in windows]
    for interpreter in windows_of:
        interpreter.env = {}
    done = 0
    with torch.no_grad():
        for node in graph_module.graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                values = [_input(window, node) for window in windows]
            elif node in wanted:
                operands = [
                    tuple(interpreter.fetch_args_kwargs_from_env(node)[0]) for interpreter in windows_of
                ]
                values = visit(node, operands)
                done += 1
                progress.update(done, len(wanted))
            else:
                values = [interpreter.run_node(node) for interpreter in windows_of]
            for interpreter, value in zip(windows_of, values, strict=True):
                interpreter.env[node] = value
                for dead in last_use.get(node, ()):
                    interpreter.env.pop(dead, None)


def _input(window: Mapping[str, torch.Tensor], node: fx.Node) -> torch.Tensor:
    if str(node.target) not in window:
        raise MemcompileError(
            "MC205",
            f"calibration gives {', '.join(sorted(window))}, but the graph also wants {node.target}",
            fix="calibrate with the inputs that the model was captured with",
        )
    return window[str(node.target)]


def _with_ancestors(nodes: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _last_uses(graph_module: fx.GraphModule, needed: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later one reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed:
            last.update(dict.fromkeys(node.all_input_nodes, node))
    freed: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        freed.setdefault(reader, []).append(value)
    return freed
