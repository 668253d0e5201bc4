"""Choose the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memcompile.errors import MemcompileError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose: greedy at temperature 0, else from the `top_k` likeliest (0: all) within mass `top_p`.

    Raises MC120 for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        warm = math.isfinite(self.temperature) and self.temperature >= 0
        for name, value, good, range_, fix in (
            ("temperature", self.temperature, warm, "0 or more", "0 always takes the likeliest token"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more", "0 keeps every token"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1", "1 keeps every token"),
            ("seed", self.seed, self.seed >= 0, "0 or more", "any number from 0 on; equal seeds draw alike"),
        ):
            if not good:
                raise MemcompileError(
                    "MC120", f"{name} is {value}, it must be {range_}", where=f"sampling.{name}", fix=fix
                )


class Sampler:
    """Draws the tokens of one row; equal seed and row give equal tokens for equal logits."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng((sampling.seed, row))

    def __call__(self, logits_V: NDArray[Any]) -> int:
        """The next token. Ties go to the lowest id. Raises MC901 for logits that are not numbers."""
        if np.isnan(logits_V).any():
            raise MemcompileError("MC901", "the model gave logits that are not numbers (NaN)")
        if self.sampling.temperature == 0 or self.sampling.top_k == 1:
            return int(logits_V.argmax())
        ids, probabilities = candidates(logits_V, self.sampling)
        # one draw a token, whatever is kept, so that a longer run begins with the shorter one
        place = int(np.searchsorted(probabilities.cumsum(), self._random.random(), side="right"))
        return int(ids[min(place, len(ids) - 1)])


def candidates(logits_V: NDArray[Any], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first, and their probabilities, which sum to 1.

    Order: temperature, top-k, top-p (the shortest list whose mass reaches `top_p`).
    """
    logits = np.asarray(logits_V, np.float64)
    size = len(logits)
    wanted = min(sampling.top_k or size, size)
    ids = np.arange(size) if wanted == size else np.sort(np.argpartition(-logits, wanted - 1)[:wanted])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = (logits[ids] - logits[ids[0]]) / max(sampling.temperature, 1e-6)
    weights = np.exp(scaled)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        before = probabilities.cumsum() - probabilities
        kept = before < sampling.top_p
        ids, probabilities = ids[kept], probabilities[kept]
        probabilities = probabilities / probabilities.sum()
    return ids, probabilities
