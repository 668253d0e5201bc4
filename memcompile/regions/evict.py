"""The eviction policy a region carries from its pass to the program."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch


class Scorer(Protocol):
    """Scores cached tokens of each key/value head; higher is kept."""

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        observed_q_BHWD: torch.Tensor | None,
        positions_BS: torch.Tensor,
    ) -> torch.Tensor:
        """Scores [B,G,S], from plain torch operators that export with a symbolic S."""
        ...


@dataclass(frozen=True, slots=True)
class EvictSpec:
    """After prefill, keep the highest-scoring tokens of each key/value head.

    Exactly one of `keep_tokens` (a count) and `keep_fraction` (0-1 of the prompt, rounded up) is given.
    The first `sink_tokens` and the last `recent_tokens` tokens are always kept.
    `observe_tokens` is the number of last queries the scorer asks for; 0: none.
    """

    scorer: Scorer
    keep_tokens: int | None = None
    keep_fraction: float | None = None
    observe_tokens: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 0

    def kept(self, prompt_tokens: int) -> int:
        """Tokens a prompt of `prompt_tokens` keeps."""
        if self.keep_tokens is not None:
            return min(self.keep_tokens, prompt_tokens)
        assert self.keep_fraction is not None
        return math.ceil(self.keep_fraction * prompt_tokens)
