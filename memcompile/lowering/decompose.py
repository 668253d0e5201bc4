"""Run or copy a graph in terms a backend has: blocks inlined, dialect operators as their definitions."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from memcompile.dialect import DIALECT

_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


class DefinitionInterpreter(fx.Interpreter):
    """Interprets a graph; every dialect operator is its definition, so only plain torch operators are left.

    Traced by `torch.export`, this decomposes what a backend has no lowering for.
    """

    definitions: Mapping[Any, Any] = {}

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.definitions = {op.target: op.definition for op in DIALECT.values()}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        definition = self.definitions.get(target)
        if definition is not None:
            return definition(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def inline_higher_order(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which the bodies of `no_grad` and autocast blocks stand in line.

    Needed before patterns are matched: transformers computes rotary angles inside such a block.
    Parameters are shared with the original; node facts (`meta`) are kept.
    """
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    graph.output(_copy(graph, graph_module, env))
    graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph)


def _copy(graph: fx.Graph, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
    def mapped(value: Any) -> Any:
        return fx.map_arg(value, lambda n: env[n])

    for node in module.graph.nodes:
        if node in env:
            continue
        if node.op == "output":
            return mapped(node.args[0])
        body = _body(node, module)
        if body is not None:
            holder = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
            operands = [mapped(a) for a in node.args[holder + 1 :]]
            env[node] = _copy(graph, body, dict(zip(inputs, operands, strict=True)))
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (tuple, list)):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    raise AssertionError("a graph ends with its output")


def _body(node: fx.Node, module: fx.GraphModule) -> fx.GraphModule | None:
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in _INLINED:
        return None
    for argument in node.args:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            body = getattr(module, str(argument.target), None)
            # a body with tensors of its own stays a block
            if isinstance(body, fx.GraphModule) and all(n.op != "get_attr" for n in body.graph.nodes):
                return body
    return None
