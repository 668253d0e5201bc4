"""Statistics of an attention region: measured per window of tokens, then joined over the windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class Statistic(Protocol):
    """A measurement of one attention region. Its `repr` names it, with every setting, in the cache."""

    def measure(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Statistics of one window, by name, from q [B,H,T,D] and k, v [B,G,S,D]."""
        ...

    def join(self, name: str, windows: torch.Tensor) -> torch.Tensor:
        """One statistic over all windows, from [windows, ...]."""
        ...


@dataclass(frozen=True, slots=True)
class ChannelRange:
    """The range of every channel of keys and values: `k` and `v`, float32 [G,D].

    With percentile 100 it is the largest magnitude seen. Below, it is the percentile of the magnitudes
    within a window (interpolated linearly), averaged over the windows.
    """

    percentile: float = 100.0

    def measure(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Mapping[str, torch.Tensor]:
        del q
        return {"k": self._range(k), "v": self._range(v)}

    def join(self, name: str, windows: torch.Tensor) -> torch.Tensor:
        del name
        return windows.amax(dim=0) if self.percentile >= 100.0 else windows.mean(dim=0)

    def _range(self, x_BGSD: torch.Tensor) -> torch.Tensor:
        magnitudes = x_BGSD.abs().float().transpose(0, 1).flatten(1, 2)  # [G, B*S, D]
        if self.percentile >= 100.0:
            return magnitudes.amax(dim=1)
        return torch.quantile(magnitudes, self.percentile / 100.0, dim=1)
