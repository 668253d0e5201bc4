"""What two lines of a plan say against each other, as far as it can be known without a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

from memcompile.errors import MemcompileError
from memcompile.plan.entries import PassEntry
from memcompile.rewrite.selectors import Every, HeadSelector, LayerSelector, Range, Site

# no model has more layers; "every 4" and "!0" are spelled out up to here
_SITES: Final = tuple(Site(layer, "") for layer in range(1024))
_HEADS: Final = 4096


def refuse_contradictions(entries: Sequence[PassEntry]) -> None:
    """Refuse a plan that surely applies one pass twice to the same heads of the same layers.

    Raises:
        MemcompileError: MC109, at the second of the two lines.
    """
    for first, second in combinations(entries, 2):
        if first.name != second.name or not _heads_overlap(first.heads, second.heads):
            continue
        if any(getattr(entry.config, "modules", None) is not None for entry in (first, second)):
            # which modules a pattern means is known when there is a model; the machinery compares them then
            continue
        if (shared := _shared_layers(first.layers, second.layers)) is not None:
            raise MemcompileError(
                "MC109",
                f"{second.name} is applied twice to {shared}, also at {first.where}",
                where=second.where,
                fix="join the two lines, or give them layers that do not overlap",
            )


def _shared_layers(first: LayerSelector | None, second: LayerSelector | None) -> str | None:
    """What both select, in words; `None` if nothing, or if only a model can tell."""
    if first is None or second is None:
        some = first or second
        return f"layers {some}" if some else "all layers"
    if first.terms == second.terms:
        return f"layers {first}"
    left, right = _layers(first), _layers(second)
    shared = sorted(left & right) if left is not None and right is not None else []
    if not shared:
        return None
    return f"layer{'s' * (len(shared) > 1)} {', '.join(map(str, shared[:4]))}{', …' * (len(shared) > 4)}"


def _layers(selector: LayerSelector) -> frozenset[int] | None:
    """The layers of a selector that names numbers; globs and shares of the depth need a model."""
    if not all(isinstance(part.term, Range | Every) for part in selector.terms):
        return None
    try:
        return selector.resolve(_SITES)
    except MemcompileError:  # beyond any model: the machinery says so when it knows the layers
        return None


def _heads_overlap(first: HeadSelector | None, second: HeadSelector | None) -> bool:
    if first is None or second is None or first.rules == second.rules:
        return True
    left, right = _heads(first), _heads(second)
    return left is not None and right is not None and not left.isdisjoint(right)


def _heads(selector: HeadSelector) -> frozenset[int] | None:
    """The key/value heads of a selector that names the same ones for every layer, by number."""
    if len(selector.rules) != 1:
        return None
    (rule,) = selector.rules
    if rule.layers is not None or rule.kind != "kv" or any(part.negated for part in rule.terms):
        return None
    numbers: set[int] = set()
    for part in rule.terms:
        assert isinstance(part.term, Range)
        numbers.update(range(part.term.first, min(part.term.last, _HEADS) + 1))
    return frozenset(numbers)
