"""Choose the bits of each weight under a budget: those whose rounding hurts least, for their bytes, go first.

Greedy, as Tai & Wu 2024, "MPTQ-ViT", arXiv:2401.14895, allocate bits: all start with the most, and the next
one lowered is that which loses least for what it saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """A weight at some bits: its stored bytes, and what it is predicted to lose (nats a token)."""

    bits: int
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Bits by weight, with the bytes and the loss they come to."""

    bits: Mapping[str, int]
    nbytes: int
    loss: float


def allocate(
    options: Mapping[str, tuple[Option, ...]],
    *,
    max_bytes: float | None = None,
    max_loss: float | None = None,
) -> Allocation:
    """Lower weights until `max_bytes` are met, or as far as `max_loss` lets; options have falling bits.

    A budget that even the least bits do not meet gets the least bits.
    """
    place = dict.fromkeys(options, 0)
    stuck: set[str] = set()
    within: list[dict[str, int]] = []
    while max_bytes is None or _bytes(options, place) > max_bytes:
        steps = [
            (_price(options[name][at], options[name][at + 1]), name)
            for name, at in place.items()
            if at + 1 < len(options[name]) and name not in stuck
        ]
        if not steps:
            break
        _, name = min(steps)
        lower = {**place, name: place[name] + 1}
        if max_loss is not None and _loss(options, lower) > max_loss:
            stuck.add(name)
        elif max_bytes is not None and _bytes(options, lower) <= max_bytes:
            # a large weight may save far more than was needed: give it back, or do without that step
            within.append(_raised(options, lower, max_bytes))
            stuck.add(name)
        else:
            place = lower
    if within:
        place = min(within, key=lambda found: _loss(options, found))
    elif max_bytes is not None and _bytes(options, place) > max_bytes:
        place = {name: len(found) - 1 for name, found in options.items()}
    bits = {name: options[name][at].bits for name, at in place.items()}
    return Allocation(bits, _bytes(options, place), _loss(options, place))


def _raised(
    options: Mapping[str, tuple[Option, ...]], place: Mapping[str, int], max_bytes: float
) -> dict[str, int]:
    """Raise weights again while they fit, those first that win most for their bytes."""
    found = dict(place)
    prices = {name: _price(options[name][at - 1], options[name][at]) for name, at in found.items() if at}
    for name in sorted(prices, key=prices.__getitem__, reverse=True):
        higher = {**found, name: found[name] - 1}
        if _bytes(options, higher) <= max_bytes:
            found = higher
    return found


def _bytes(options: Mapping[str, tuple[Option, ...]], place: Mapping[str, int]) -> int:
    return sum(options[name][at].nbytes for name, at in place.items())


def _loss(options: Mapping[str, tuple[Option, ...]], place: Mapping[str, int]) -> float:
    return sum(options[name][at].loss for name, at in place.items())


def _price(now: Option, then: Option) -> float:
    """Loss for each byte saved; a step that saves nothing comes last."""
    saved = now.nbytes - then.nbytes
    return (then.loss - now.loss) / saved if saved > 0 else float("inf")
