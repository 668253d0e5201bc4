"""Prove what a mask is: evaluate it at several lengths and compare with the masks that have a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from memcompile.frontend.recognise.emit import PRIMES
from memcompile.frontend.recognise.evaluate import (
    Evaluator,
    Unevaluable,
    ancestors,
    batch_and_tokens,
    expression,
    fetch,
    shape_of,
    sized,
    symbols_of,
    ties_of,
    widen,
)

aten = torch.ops.aten
# an additive mask hides a key from here on: exp(-1e4) is 0 in every float type
HIDDEN = -1.0e4
_SHORT_LENGTHS = (1, 2, 3, 4, 5, 8, 13, 17)
_LONGEST = 4200
_LARGEST_CONSTANT = 1 << 21
_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal")


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What is known of a mask.

    keep: the 2-D input that says which keys are padding; kept_value: what it holds for the others.
    runtime: nothing is proven, the mask stays an operand; `why` says why.
    """

    causal: bool = False
    window: int = 0
    keep: fx.Node | None = None
    kept_value: int = 1
    runtime: bool = False
    why: str = ""


class Probes:
    """The model's inputs, to evaluate parts of its graph at any size."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> None:
        self.graph_module = graph_module
        self.inputs = inputs
        self.limits = symbols_of(graph_module.graph)
        self.ties = ties_of(graph_module.graph)
        batch, tokens = batch_and_tokens(graph_module.graph)
        self.batch = [s for s in batch if s not in self.ties]
        self.tokens = [s for s in tokens if s not in self.ties]

    def sizes(self, tokens: int, batch: int) -> dict[sympy.Symbol, int]:
        """Sizes of every symbol: `tokens` for the first that is no batch, two more for each other."""
        chosen = {symbol: tokens + 2 * index for index, symbol in enumerate(self.tokens)}
        chosen |= dict.fromkeys(self.batch, batch)
        sizes = {s: min(max(n, self.limits[s][0]), self.limits[s][1]) for s, n in chosen.items()}
        return sizes | {one: sizes[other] for one, other in self.ties.items() if other in sizes}

    def primes(self) -> dict[sympy.Symbol, int]:
        """A prime for every size: equal numbers are then equal sizes, and factors can be told apart."""
        free = [s for s in self.limits if s not in self.ties]
        primes = dict(zip(free, PRIMES, strict=False))
        return primes | {one: primes[other] for one, other in self.ties.items() if other in primes}

    def same(self, one: Any, other: Any) -> bool:
        """Whether two sizes are the same size."""
        left, right = (expression(size).subs(self.ties) for size in (one, other))
        return bool(left == right)

    @property
    def token_limit(self) -> int:
        """The most tokens that the capture allows."""
        return min((self.limits[s][1] for s in self.tokens), default=1)

    def evaluator(
        self, sizes: Mapping[sympy.Symbol, int], known: Mapping[fx.Node, Any] | None = None,
        replaced: Mapping[float, int] | None = None,
    ) -> Evaluator:  # fmt: skip
        return Evaluator(self.graph_module, sizes, self.inputs, known, replaced)

    @property
    def is_static(self) -> bool:
        return not self.tokens


def data_of(probes: Probes, mask: fx.Node) -> tuple[list[fx.Node], list[str]]:
    """The inputs whose values a mask depends on, and what else keeps it from being a constant."""
    inputs: list[fx.Node] = []
    others: list[str] = []
    for node in ancestors([mask]):
        if node.op == "placeholder":
            inputs.append(node)
        elif node.op == "get_attr":
            value = fetch(probes.graph_module, str(node.target))
            if isinstance(value, torch.nn.Parameter):
                others.append(f"the parameter {node.target}")
        elif any(word in str(node.target) for word in _RANDOM):
            others.append(f"the random {node.name}")
    return inputs, others


def prove(probes: Probes, mask: fx.Node, queries: Any, keys: Any) -> MaskFacts:
    """Classify a mask node (bool, True: may look; or additive), broadcastable to [B,H,T,S].

    queries, keys: the sizes T and S as the graph knows them.
    """
    inputs, others = data_of(probes, mask)
    if others and not inputs:
        return MaskFacts(runtime=True, why=f"the mask depends on {others[0]}")
    if not inputs:
        return prove_constant(probes, mask, queries, keys)
    if not others and len(inputs) == 1 and _is_padding_shape(probes, inputs[0], keys):
        found = _prove_padding(probes, mask, inputs[0], queries, keys)
        if found is not None:
            return found
    names = ", ".join(sorted(n.name for n in inputs)[:3])
    return MaskFacts(runtime=True, why=f"the mask depends on the values of {names}")


def prove_constant(
    probes: Probes, mask: fx.Node, queries: Any, keys: Any, filled: Mapping[fx.Node, int] | None = None
) -> MaskFacts:
    """Compare a mask of sizes only with causal, windowed and no masking, at every telling length.

    A number too large to evaluate beyond (a window of 32768) is replaced by two small ones; the mask is
    proven when it follows both alike. filled: nodes to replace by one value everywhere.
    """
    constants = _constants(probes, mask)
    beyond = [c for c in constants if _LONGEST < c < probes.token_limit]
    if not beyond:
        return _prove_at_lengths(probes, mask, queries, keys, constants, filled, {})
    too_long = f"the mask may change after {beyond[0]} tokens, too long to evaluate"
    if len(beyond) > 1:
        return MaskFacts(runtime=True, why=too_long)
    small = [c for c in constants if c < _LONGEST]
    near, far = (
        _prove_at_lengths(probes, mask, queries, keys, [*small, n], filled, {beyond[0]: n}) for n in (19, 37)
    )
    if near.runtime or far.runtime:
        return near if near.runtime else far
    if near == far:
        return near
    if near.causal == far.causal and near.window and far.window - near.window == 37 - 19:
        return replace(near, window=beyond[0] + near.window - 19)
    return MaskFacts(runtime=True, why=too_long)


def _prove_at_lengths(
    probes: Probes, mask: fx.Node, queries: Any, keys: Any, constants: Sequence[int],
    filled: Mapping[fx.Node, int] | None, replaced: Mapping[float, int],
) -> MaskFacts:  # fmt: skip
    seen = 0
    candidates: list[tuple[bool, int]] | None = None
    for length in _lengths(constants, probes.token_limit, probes.is_static):
        sizes = probes.sizes(length, 2 if length <= 64 else 1)
        try:
            value = probes.evaluator(sizes, _constant_values(filled or {}, sizes), replaced)(mask)
        except Unevaluable:
            continue
        visible = visibility(value)
        if visible is None:
            return MaskFacts(runtime=True, why="the mask adds values to the scores")
        seen += 1
        candidates = _surviving(candidates, visible, sized(queries, sizes), sized(keys, sizes))
        if not candidates:
            return MaskFacts(runtime=True, why="the mask is neither causal, nor a sliding window, nor empty")
    if candidates is None or candidates[0][1] == -1 or (seen < 3 and not probes.is_static):
        return MaskFacts(runtime=True, why="the mask could not be evaluated at several lengths")
    causal, window = candidates[0]
    return MaskFacts(causal=causal, window=window)


def _constant_values(filled: Mapping[fx.Node, int], sizes: Mapping[sympy.Symbol, int]) -> dict[fx.Node, Any]:
    values = {}
    for node, number in filled.items():
        value = node.meta["val"]
        dtype = widen(torch.empty(0, dtype=value.dtype)).dtype
        values[node] = torch.full(shape_of(node, sizes), number, dtype=dtype)
    return values


def visibility(mask: torch.Tensor) -> torch.Tensor | None:
    """Which keys a mask lets through; None when it changes the scores it lets through."""
    if mask.dtype == torch.bool:
        return mask
    visible = mask > HIDDEN
    return visible if not bool((mask[visible] != 0).any()) else None


def named_mask(causal: bool, window: int, queries: int, keys: int) -> torch.Tensor:
    """The bool [T,S] of a mask that has a name; the queries are the last T of the keys."""
    distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys).unsqueeze(0)
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible & (distance.abs() < window) if window else visible


def _surviving(
    candidates: list[tuple[bool, int]] | None, visible: torch.Tensor, queries: int, keys: int
) -> list[tuple[bool, int]]:
    """The candidates that explain this mask too, the plainest first."""
    rows = visible.reshape(-1, *visible.shape[-2:]) if visible.ndim >= 2 else visible.reshape(1, 1, -1)
    first = rows[:1]
    if bool((rows != first).any()):
        return []
    square = first.broadcast_to(1, queries, keys)[0]
    if candidates is None:
        candidates = [(False, 0), (True, 0), (True, -1), (False, -1)]
    fitting = []
    for causal, window in candidates:
        width = window
        if window == -1 and queries == keys:
            # the last query tells the width, once the mask is long enough to show one
            seen = int(square[-1].sum())
            width = seen if seen < keys else -1
        # a width not shown yet is no limit so far
        if bool((square == named_mask(causal, max(width, 0), queries, keys)).all()):
            fitting.append((causal, width))
    unsettled = [c for c in fitting if c[1] == -1]
    return [c for c in fitting if c[1] != -1] + unsettled


def _lengths(constants: Sequence[int], limit: int, static: bool) -> list[int]:
    if static:
        return [1]
    wanted = set(_SHORT_LENGTHS)
    for constant in constants:
        # a mask can change at a number that stands in its making, and a buffer ends at its size
        wanted |= {constant + 2} if constant + 2 <= limit else {limit}
        if constant <= 1100:
            wanted |= {constant, constant + 1}
    return sorted(n for n in wanted if 1 <= n <= limit)


def _constants(probes: Probes, mask: fx.Node) -> list[int]:
    """Every number in the mask's making that could be a length: arguments, buffers' sizes and values."""
    found: set[int] = set()

    def note(value: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_CONSTANT:
            found.add(abs(int(value)))

    seen: set[fx.Node] = set()
    stack = [mask]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        if node.op == "get_attr":
            value = fetch(probes.graph_module, str(node.target))
            if isinstance(value, torch.Tensor):
                for size in value.shape:
                    note(size)
                if value.numel() == 1:
                    note(value.item())
            continue
        torch.utils._pytree.tree_map(note, (node.args, dict(node.kwargs)))
    return sorted(n for n in found if n > 1)


def _is_padding_shape(probes: Probes, node: fx.Node, keys: Any) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim != 2:
        return False
    return probes.same(value.shape[1], keys)


def _prove_padding(probes: Probes, mask: fx.Node, keep: fx.Node, queries: Any, keys: Any) -> MaskFacts | None:
    """A mask that is a constant one, minus the keys a 2-D input marks."""
    for kept_value in (1, 0):
        plain = prove_constant(probes, mask, queries, keys, {keep: kept_value})
        found = replace(plain, keep=keep, kept_value=kept_value)
        if not plain.runtime and all(_hides_marked(probes, mask, found, n, queries, keys) for n in (3, 5, 9)):
            return found
    return None


def _hides_marked(
    probes: Probes, mask: fx.Node, facts: MaskFacts, length: int, queries: Any, keys: Any
) -> bool:
    assert facts.keep is not None
    sizes = probes.sizes(length, 2)
    marks, kept = random_marks(facts, sizes, seed=length)
    try:
        visible = visibility(probes.evaluator(sizes, {facts.keep: marks})(mask))
    except Unevaluable:
        return False
    if visible is None:
        return False
    named = named_mask(facts.causal, facts.window, sized(queries, sizes), sized(keys, sizes))
    wanted = named & kept.unsqueeze(1).unsqueeze(1)
    try:
        # [B,1,T,S] against anything that broadcasts to [B,H,T,S]
        return bool((visible == wanted).all())
    except RuntimeError:
        return False


def random_marks(
    facts: MaskFacts, sizes: Mapping[sympy.Symbol, int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random value of the padding input, and which keys it keeps [B,S]."""
    assert facts.keep is not None
    value = facts.keep.meta["val"]
    kept = random_keep(shape_of(facts.keep, sizes), seed)
    marks = torch.where(kept, facts.kept_value, 1 - facts.kept_value)
    return marks.to(widen(torch.empty(0, dtype=value.dtype)).dtype), kept


def random_keep(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Random keep marks [B,S]: both ends and the middle get padding somewhere, no row is empty."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(tuple(shape), generator=generator) > 0.4
    kept[0, :] = torch.arange(shape[1]) >= min(1, shape[1] - 1)
    kept[-1, 0] = True
    return kept


__all__ = ["MaskFacts", "Probes", "named_mask", "prove", "random_marks", "visibility"]
