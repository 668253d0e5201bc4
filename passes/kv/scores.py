"""Scorers of cached tokens: plain torch, one dataclass each, exportable with a symbolic number of tokens.

Shapes: k, v [B,G,S,D]; observed queries [B,H,W,D], newest last, zeros on the left while fewer were seen;
positions [B,S], -1 for empty slots. Scores are float32 [B,G,S]; higher is kept. What an empty slot scores
does not matter: the program never keeps one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch


@dataclass(frozen=True, slots=True)
class ObservedAttention:
    """Attention that the last `observe_tokens` queries of the prompt pay to each key.

    For each query head: softmax over all keys it may see (causal within the observed tokens), mean over the
    observed queries, zero on the observed tokens themselves (they are kept anyway, and would leak through the
    pooling), pooled over neighbouring tokens; then reduced over the query heads of a group.

    Li et al. 2024, SnapKV, arXiv:2404.14469.
    """

    observe_tokens: int
    scale: float
    softcap: float = 0.0
    pool: Literal["avg", "max"] = "avg"
    pool_kernel: int = 7
    group_reduce: Literal["mean", "max"] = "mean"
    name: ClassVar[str] = "observed_attention"

    def __call__(
        self,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        observed_q_BHWD: torch.Tensor | None,
        positions_BS: torch.Tensor,
    ) -> torch.Tensor:
        del v_BGSD
        if observed_q_BHWD is None:
            raise ValueError("observed_attention needs observed queries")
        batch, groups = k_BGSD.shape[0], k_BGSD.shape[1]
        heads, width = observed_q_BHWD.shape[1], observed_q_BHWD.shape[3]
        window = observed_q_BHWD.shape[2]
        # scores in float32: in bfloat16 neighbouring keys tie and the eviction becomes order-dependent
        q = observed_q_BHWD.float().reshape(batch, groups, (heads // groups) * window, width)
        logits = torch.matmul(q, k_BGSD.float().transpose(2, 3)) * self.scale
        if self.softcap > 0.0:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits.reshape(batch, heads, window, -1)
        newest = positions_BS.amax(dim=1, keepdim=True)
        age = torch.arange(window - 1, -1, -1, device=positions_BS.device).unsqueeze(0)
        query_positions = newest - age  # [B,W]
        keys = positions_BS.unsqueeze(1)
        visible = (keys >= 0) & (keys <= query_positions.unsqueeze(2))  # [B,W,S]
        visible = visible.unsqueeze(1)
        weights = torch.softmax(logits.masked_fill(~visible, -1e30), dim=-1).masked_fill(~visible, 0.0)
        seen = (query_positions >= 0).sum(dim=1).clamp(min=1).to(weights.dtype)
        mean_BHS = weights.sum(dim=2) / seen.reshape(-1, 1, 1)
        observed = positions_BS > newest - window
        pooled = self._pooled(mean_BHS.masked_fill(observed.unsqueeze(1), 0.0))
        grouped = pooled.reshape(batch, groups, heads // groups, -1)
        return grouped.mean(dim=2) if self.group_reduce == "mean" else grouped.amax(dim=2)

    def _pooled(self, scores_BHS: torch.Tensor) -> torch.Tensor:
        if self.pool_kernel == 1:
            return scores_BHS
        # in two dimensions: torch.export fixes the length of what max_pool1d sees
        pooling = torch.nn.functional.avg_pool2d if self.pool == "avg" else torch.nn.functional.max_pool2d
        kernel, padding = (1, self.pool_kernel), (0, self.pool_kernel // 2)
        pooled: torch.Tensor = pooling(scores_BHS.unsqueeze(2), kernel, stride=1, padding=padding)
        return pooled.squeeze(2)


@dataclass(frozen=True, slots=True)
class Recency:
    """The later a token, the higher its score: with sinks protected, what StreamingLLM keeps.

    Xiao et al. 2023, arXiv:2309.17453.
    """

    name: ClassVar[str] = "recency"

    def __call__(
        self,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        observed_q_BHWD: torch.Tensor | None,
        positions_BS: torch.Tensor,
    ) -> torch.Tensor:
        del v_BGSD, observed_q_BHWD
        return positions_BS.float().unsqueeze(1).expand(-1, k_BGSD.shape[1], -1)


@dataclass(frozen=True, slots=True)
class KeyNorm:
    """Keys with a small Euclidean norm score high.

    Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
    arXiv:2406.11430.
    """

    name: ClassVar[str] = "key_norm"

    def __call__(
        self,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        observed_q_BHWD: torch.Tensor | None,
        positions_BS: torch.Tensor,
    ) -> torch.Tensor:
        del v_BGSD, observed_q_BHWD, positions_BS
        return -k_BGSD.float().square().sum(dim=-1).sqrt()
