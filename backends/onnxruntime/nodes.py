"""The operator domains that lowered graphs use, and the one way to put nodes in another's place."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

MEMCOMPILE: Final = "memcompile"
MICROSOFT: Final = "com.microsoft"


def replace_node(graph: ir.Graph, node: ir.Node, *nodes: ir.Node) -> None:
    """Put `nodes`, of which the last gives what `node` gave, in its place."""
    graph.insert_before(node, nodes)
    old, made = node.outputs[0], nodes[-1].outputs[0]
    made.name, made.type, made.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
