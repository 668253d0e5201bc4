"""Run parts of a graph in float64 at chosen sizes, without running the model in front of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten
Sizes = Mapping[sympy.Symbol, int]
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Unevaluable(Exception):
    """A part of the graph has no value at these sizes; the message says which node."""


def expression(size: Any) -> sympy.Expr:
    """The symbolic expression of a size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def sized(size: Any, sizes: Sizes) -> int:
    """A size with its symbols replaced; raises `Unevaluable` when one is missing or the result is no size."""
    value = expression(size).subs(dict(sizes))
    if not value.is_Integer or int(value) < 0:
        raise Unevaluable(f"a size is {value}")
    return int(value)


def shape_of(node: fx.Node, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a node's value, symbols replaced."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unevaluable(f"{node.name} is not a tensor")
    return tuple(sized(s, sizes) for s in value.shape)


def symbols_of(graph: fx.Graph) -> dict[sympy.Symbol, tuple[int, int]]:
    """Every size symbol of the inputs, with the smallest and largest size that the capture allows."""
    ranges: dict[sympy.Symbol, tuple[int, int]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        for size in value.shape:
            for symbol in sorted(expression(size).free_symbols, key=str):
                known = size.node.shape_env.var_to_range.get(symbol)  # type: ignore[attr-defined]
                low, high = (known.lower, known.upper) if known is not None else (1, 1 << 30)
                ranges[symbol] = (max(1, _bounded(low)), _bounded(high))
    return ranges


def _bounded(limit: Any) -> int:
    return int(limit) if getattr(limit, "is_Integer", isinstance(limit, int)) else 1 << 30


def ties_of(graph: fx.Graph) -> dict[sympy.Symbol, sympy.Symbol]:
    """Symbols that are one size in truth: a fused attention needs its mask to fit, noted or not."""
    ties: dict[sympy.Symbol, sympy.Symbol] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        operands = [n.meta.get("val") for n in (node.args[0], node.args[1], mask) if isinstance(n, fx.Node)]
        values = [v for v in operands if isinstance(v, torch.Tensor)]
        if len(values) != 3:
            continue
        q, k, m = values
        scores = (*q.shape[:-1], k.shape[-2])
        for have, wanted in zip(reversed(m.shape), reversed(scores), strict=False):
            one, other = expression(have), expression(wanted)
            if isinstance(one, sympy.Symbol) and isinstance(other, sympy.Symbol) and one != other:
                ties[one] = ties.get(other, other)
    return ties


def batch_and_tokens(graph: fx.Graph) -> tuple[list[sympy.Symbol], list[sympy.Symbol]]:
    """The symbols of the inputs' first axes, and all others."""
    batch = dict.fromkeys(
        leading
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.ndim > 1 and isinstance(leading := expression(value.shape[0]), sympy.Symbol)
    )  # fmt: skip
    return list(batch), [s for s in symbols_of(graph) if s not in batch]


def resize(probe: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`probe` cropped or repeated to `shape`; integers that count on along an axis go on counting."""
    out = probe
    for axis, size in enumerate(shape):
        have = out.shape[axis]
        if size <= have:
            out = out.narrow(axis, 0, size)
            continue
        counts_on = have > 1 and not out.dtype.is_floating_point and out.dtype != torch.bool
        counts_on = counts_on and bool((out.diff(dim=axis) == 1).all())
        index = torch.arange(size) % max(have, 1)
        grown = out.index_select(axis, index)
        if counts_on:
            offset = (torch.arange(size) - index).reshape([-1 if a == axis else 1 for a in range(out.ndim)])
            grown = grown + offset.to(grown.dtype)
        out = grown
    return out.contiguous()


class Evaluator:
    """Values of nodes at given sizes, floats in float64, computed on demand and kept.

    `known` holds values to start from: a node in it is never computed, so what feeds it never runs.
    `replaced` puts other numbers in the place of constants.
    """

    def __init__(
        self, graph_module: fx.GraphModule, sizes: Sizes, probes: Mapping[str, torch.Tensor],
        known: Mapping[fx.Node, Any] | None = None, replaced: Mapping[float, int] | None = None,
    ) -> None:  # fmt: skip
        self.graph_module = graph_module
        self.sizes = sizes
        self.probes = probes
        self.values: dict[fx.Node, Any] = dict(known or {})
        self.replaced = dict(replaced or {})

    def __call__(self, node: fx.Node) -> Any:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad():
                return self._value(node)
        finally:
            torch.set_default_dtype(previous)

    def _value(self, root: fx.Node) -> Any:
        # an explicit stack: mask preludes are deeper than Python's recursion allows
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self.values:
                stack.pop()
                continue
            immediate = self._immediate(node)
            if immediate is not None:
                self.values[node] = immediate
                continue
            waiting = [n for n in _needed(node) if n not in self.values]
            if waiting:
                stack.extend(waiting)
                continue
            self.values[node] = self._run(node)
        return self.values[root]

    def _immediate(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if (
            isinstance(value, (torch.SymInt, int))
            and not isinstance(value, bool)
            and node.op != "placeholder"
        ):
            return sized(value, self.sizes)
        if node.op == "get_attr":
            return widen(fetch(self.graph_module, str(node.target)))
        if node.op == "placeholder":
            if isinstance(value, torch.Tensor):
                probe = self.probes.get(node.name)
                if probe is None:
                    raise Unevaluable(f"no probe for the input {node.name}")
                return widen(resize(probe, shape_of(node, self.sizes)))
            return sized(value, self.sizes) if isinstance(value, (torch.SymInt, int)) else value
        return None

    def _argument(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        # only its shape and type are looked at
        return widen(torch.zeros((), dtype=node.meta["val"].dtype)).expand(shape_of(node, self.sizes))

    def _number(self, value: float) -> float:
        return self.replaced.get(value, value) if not isinstance(value, bool) else value

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs))
        if self.replaced:
            args, kwargs = pytree.tree_map_only((int, float), self._number, (args, kwargs))
        if node.op != "call_function" or not callable(node.target):
            raise Unevaluable(f"{node.name} is a {node.op}")
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unevaluable(f"{node.name}: {first}") from error


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in _NARROW else dtype


def widen(value: Any) -> Any:
    """Floating tensors in float64; anything else as it is."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to(_wide(value.dtype))
    return value


def fetch(module: torch.nn.Module, target: str) -> Any:
    """The attribute a `get_attr` node names."""
    return operator.attrgetter(target)(module)


def ancestors(roots: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes whose *values* the roots need, roots included, up to `stop`; sizes are not values."""
    seen: set[fx.Node] = set()
    halt = set(stop)
    stack = [r for r in roots if r not in halt]
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node.meta.get("val"), (torch.SymInt, int)):
            continue
        seen.add(node)
        stack.extend(n for n in _needed(node) if n not in halt)
    return seen


def _needed(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node needs."""
    if node.target in SHAPE_ONLY:
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return node.all_input_nodes


# of their first operand only the type, the device and the shape matter
SHAPE_ONLY = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default, aten.new_empty.default, aten.empty_like.default,
}  # fmt: skip
