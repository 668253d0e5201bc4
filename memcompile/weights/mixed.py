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
    nbytes = sum(found[0].nbytes for found in options.values())
    loss = sum(found[0].loss for found in options.values())
    stuck: set[str] = set()
    while max_bytes is None or nbytes > max_bytes:
        steps = [
            (_price(options[name][at], options[name][at + 1]), name)
            for name, at in place.items()
            if at + 1 < len(options[name]) and name not in stuck
        ]
        if not steps:
            break
        _, name = min(steps)
        now, then = options[name][place[name]], options[name][place[name] + 1]
        if max_loss is not None and loss + then.loss - now.loss > max_loss:
            stuck.add(name)
            continue
        place[name] += 1
        nbytes += then.nbytes - now.nbytes
        loss += then.loss - now.loss
    return Allocation({name: options[name][at].bits for name, at in place.items()}, nbytes, loss)


def _price(now: Option, then: Option) -> float:
    """Loss for each byte saved; a step that saves nothing comes last."""
    saved = now.nbytes - then.nbytes
    return (then.loss - now.loss) / saved if saved > 0 else float("inf")
