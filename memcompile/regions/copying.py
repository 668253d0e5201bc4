"""Copy a graph over the same parameters."""

from __future__ import annotations

import copy

from torch import fx


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same parameters; node facts (`meta`) are kept."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, mapping)
    old_output = next(n for n in graph_module.graph.nodes if n.op == "output")
    graph.output(result if result is not None else fx.map_arg(old_output.args[0], lambda n: mapping[n]))
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(graph_module, graph)
