"""Turn logits into losses, divergences and agreements, in accumulations of float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_ROWS: Final = 16
_VOCABULARY_CHUNK: Final = 16384

FloatArray = NDArray[np.float64]


def log_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return log-softmax over the last axis of logits [N, V]; the normaliser is summed in float64."""
    out = np.empty(logits.shape, dtype=np.float32)
    for first in range(0, logits.shape[0], _ROWS):
        block = logits[first : first + _ROWS].astype(np.float64)
        block -= block.max(axis=-1, keepdims=True)
        block -= np.log(np.exp(block).sum(axis=-1, keepdims=True))
        out[first : first + _ROWS] = block
    return out


def token_losses(log_probs: NDArray[np.floating], targets: NDArray[np.int64]) -> FloatArray:
    """Return the negative log-probability of each target: [N, V], [N] -> [N]."""
    return -log_probs[np.arange(targets.size), targets].astype(np.float64)


def kl_divergence(reference: NDArray[np.floating], candidate: NDArray[np.floating]) -> FloatArray:
    """Return KL(reference || candidate) of each row of two log-probability arrays [N, V].

    A token that the reference gives no probability adds nothing.
    """
    total = np.zeros(reference.shape[0], dtype=np.float64)
    for first in range(0, reference.shape[1], _VOCABULARY_CHUNK):
        p = reference[:, first : first + _VOCABULARY_CHUNK].astype(np.float64)
        q = candidate[:, first : first + _VOCABULARY_CHUNK].astype(np.float64)
        weight = np.exp(p)
        total += np.where(weight > 0, weight * (p - q), 0.0).sum(axis=1)
    return total


@dataclass(frozen=True, slots=True)
class LossSummary:
    """Losses of scored positions, summed up."""

    nll_sum: float
    count: int
    nll_stderr: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_sum / self.count) if self.count else math.nan


def summarise(losses: FloatArray) -> LossSummary:
    """Sum losses up; the standard error takes positions as independent, so it is a lower bound."""
    count = int(losses.size)
    stderr = float(losses.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return LossSummary(nll_sum=float(losses.sum()), count=count, nll_stderr=stderr)
