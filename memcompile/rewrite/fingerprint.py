"""The text of a graph, node by node: what tells two graphs apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# what passes store in a node's metadata for later stages; the rest of the metadata says nothing about meaning
MEANING_IN_META = ("evict", "kv_head_ids")


def node_text(node: fx.Node) -> str:
    """One node with its target, its arguments by name, and the metadata that carries meaning."""
    target = node.target if isinstance(node.target, str) else _qualified(node.target)
    arguments = [_text(argument) for argument in node.args]
    arguments += [f"{name}={_text(value)}" for name, value in sorted(node.kwargs.items())]
    meaning = [f"{key}={node.meta[key]!r}" for key in MEANING_IN_META if key in node.meta]
    return f"{node.op} {target}({', '.join(arguments)})" + (f"  # {'; '.join(meaning)}" if meaning else "")


def graph_lines(graph_module: fx.GraphModule) -> dict[str, str]:
    """The text of every node, by node name, in graph order."""
    return {node.name: node_text(node) for node in graph_module.graph.nodes}


def graph_text(graph_module: fx.GraphModule) -> str:
    """The whole graph as text, without the values of its tensors."""
    return "\n".join(f"{name} = {text}" for name, text in graph_lines(graph_module).items())


def _qualified(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(inner) for inner in value) + "]"
    return repr(value)
