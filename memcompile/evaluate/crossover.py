"""From which prompt length on is the rewritten model faster?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LengthPoint = dict[str, float]


def crossover_lengths(prompt_tokens: int) -> tuple[int, ...]:
    """Return the shorter prompts that are measured as well: an eighth and three eighths of the workload's."""
    lengths = (prompt_tokens // 8, 3 * prompt_tokens // 8)
    return tuple(sorted({length for length in lengths if length >= 16}))


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where the rewrite begins to be faster, for one way of counting time.

    `tokens` is the length from which it is (0: at every length measured; None: at none of them).
    """

    quantity: str
    tokens: int | None
    measured: tuple[tuple[int, float], ...]

    def as_dict(self) -> dict[str, Any]:
        points = [{"prompt_tokens": tokens, "speedup": speedup} for tokens, speedup in self.measured]
        return {"quantity": self.quantity, "tokens": self.tokens, "measured": points}


def crossovers(
    original: Sequence[LengthPoint], rewritten: Sequence[LengthPoint], *, new_tokens: int
) -> tuple[Crossover, ...]:
    """Compare prefill, decode, and whole requests (prefill and `new_tokens` tokens) at each length."""
    found = []
    for quantity in ("prefill", "decode", "request"):
        before = {int(point["prompt_tokens"]): _seconds(point, quantity, new_tokens) for point in original}
        after = {int(point["prompt_tokens"]): _seconds(point, quantity, new_tokens) for point in rewritten}
        both = sorted(before.keys() & after.keys())
        points = tuple((tokens, before[tokens] / after[tokens]) for tokens in both)
        found.append(Crossover(quantity, faster_from(points), points))
    return tuple(found)


def _seconds(point: LengthPoint, quantity: str, new_tokens: int) -> float:
    prefill, decode = point["prefill_seconds"], point["decode_seconds_per_token"]
    return {"prefill": prefill, "decode": decode, "request": prefill + new_tokens * decode}[quantity]


def faster_from(points: Sequence[tuple[int, float]]) -> int | None:
    """Return the length from which the speedup stays at 1 or above, interpolated between lengths."""
    if not points or not points[-1][1] >= 1:
        return None
    faster = len(points) - 1
    while faster > 0 and points[faster - 1][1] >= 1:
        faster -= 1
    if faster == 0:
        return 0
    (low, slow), (high, fast) = points[faster - 1], points[faster]
    return round(low + (1 - slow) / (fast - slow) * (high - low))
