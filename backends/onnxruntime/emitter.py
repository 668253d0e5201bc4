"""Run a graph while `torch.export` traces it, emitting ONNX Runtime's own operators where it has them.

A lowering is a function of the emitter and a node. It returns the node's value, or None when the node is not
one it can express: then a dialect operator is traced as its definition, any other operator as itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.nodes import MICROSOFT
from memcompile.lowering import DefinitionInterpreter

Lowering = Callable[["Emitter", fx.Node], Any]
Attributes = dict[str, Any]
Shape = Sequence[int | torch.SymInt]

OPSET = 23
LOWERINGS: dict[Any, Lowering] = {}


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Register a lowering for graph targets. Several may share a target: the first that answers wins."""

    def register(lowering: Lowering) -> Lowering:
        for target in targets:
            LOWERINGS[target] = _first_of(LOWERINGS[target], lowering) if target in LOWERINGS else lowering
        return lowering

    return register


def _first_of(first: Lowering, second: Lowering) -> Lowering:
    def either(emitter: Emitter, node: fx.Node) -> Any:
        value = first(emitter, node)
        return second(emitter, node) if value is None else value

    return either


class Emitter(DefinitionInterpreter):
    """Interprets one graph. `memo` holds values that several nodes share, such as a group's mask.

    `tables` maps the name of a position-table placeholder to a mask whose sum over a row is its count of
    keys, and "position_ids" to the positions of the queries, where the graph has them. `wide` is set where
    the device computes in float32 only: other float types are cast on the way in. `products` is the type that
    our kernels may round to what they multiply.
    """

    def __init__(
        self, graph_module: fx.GraphModule, *, wide: bool = False, products: str = "float32"
    ) -> None:
        super().__init__(graph_module)
        self.products = products
        self.memo: dict[Any, Any] = {}
        self.tables: dict[str, Any] = {}
        self._wide = wide

    def value(self, node: Any) -> Any:
        """What `node` (an argument of a node in hand) stands for."""
        return self.env[node] if isinstance(node, fx.Node) else node

    def run_node(self, n: fx.Node) -> Any:
        lowering = LOWERINGS.get(n.target) if n.op == "call_function" else None
        if lowering is not None:
            value = lowering(self, n)
            if value is not None:
                return value
        value = super().run_node(n)
        if self._wide and n.op == "get_attr" and isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._wide:
            args, kwargs = _widen(args), _widen(kwargs)
        return super().call_function(target, args, kwargs)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value.is_floating_point else value
    if isinstance(value, (tuple, list)):
        return type(value)(_widen(v) for v in value)
    return {k: _widen(v) for k, v in value.items()} if isinstance(value, dict) else value


def emit(
    operator: str,
    inputs: Sequence[torch.Tensor | None],
    attributes: Attributes,
    *,
    like: torch.Tensor,
    shape: Shape | None = None,
    version: int = OPSET,
) -> torch.Tensor:
    """One ONNX operator with one output, of `like`'s type and (unless given) shape."""
    return torch.onnx.ops.symbolic(
        operator,
        inputs,
        attributes,
        dtype=like.dtype,
        shape=like.shape if shape is None else shape,
        version=1 if operator.startswith(f"{MICROSOFT}::") else version,
    )
