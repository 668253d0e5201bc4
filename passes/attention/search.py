"""The pattern of each head, searched on calibration text: the cheapest that keeps enough of its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from memcompile.dialect.selection import Kind, chosen_keys

# rows whose attention is looked at; they are spread over the second half of the window
SCORED_ROWS: Final = 128
# as shares of the window: first and local tokens, columns and diagonals, blocks
SHAPES: Final = ((1 / 64, 1 / 16), (1 / 32, 1 / 8), (1 / 32, 1 / 4))
COLUMNS_AND_DIAGONALS: Final = ((1 / 64, 1 / 64), (1 / 16, 1 / 32), (1 / 32, 1 / 8), (1 / 8, 1 / 8))
BLOCKS: Final = (1 / 16, 1 / 8, 1 / 4)


@dataclass(frozen=True, slots=True)
class SearchPatterns:
    """`pattern` int32 [H,4], `mass` [H] kept and `density` [H] of what a causal head looks at.

    After Jiang et al. 2024, MInference, arXiv:2407.02490, with the roles of cost and quality exchanged.
    """

    block_tokens: int
    keep_mass: float

    def measure(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Mapping[str, torch.Tensor]:
        del v
        heads, groups = q.shape[1], k.shape[1]
        found = [
            self._best(q[0, head].float(), k[0, head // (heads // groups)].float()) for head in range(heads)
        ]
        return {
            "pattern": torch.tensor([pattern for pattern, _, _ in found], dtype=torch.int32),
            "mass": torch.tensor([mass for _, mass, _ in found]),
            "density": torch.tensor([density for _, _, density in found]),
        }

    def join(self, name: str, windows: torch.Tensor) -> torch.Tensor:
        del name
        return windows[0]

    def _best(self, q_TD: torch.Tensor, k_SD: torch.Tensor) -> tuple[tuple[int, int, int, int], float, float]:
        tokens = len(q_TD)
        rows = torch.linspace(tokens // 2, tokens - 1, min(SCORED_ROWS, tokens)).long()
        scale = q_TD.shape[1] ** -0.5
        visible = torch.arange(tokens) <= rows.unsqueeze(1)
        scores = (q_TD[rows] @ k_SD.T * scale).masked_fill(~visible, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        best: tuple[tuple[int, int, int, int], float, float] | None = None
        for pattern in self._candidates(tokens):
            chosen = chosen_keys(
                q_TD.unsqueeze(0),
                k_SD.unsqueeze(0),
                torch.tensor([pattern]),
                block=self.block_tokens,
                scale=scale,
            )[0, rows]
            kept = chosen & visible
            mass = float((weights * kept).sum(-1).mean())
            density = float(kept.sum() / visible.sum())
            if best is None or _better(mass, density, best, self.keep_mass):
                best = pattern, mass, density
        assert best is not None
        return best

    def _candidates(self, tokens: int) -> list[tuple[int, int, int, int]]:
        found = [(int(Kind.SHAPE), int(a * tokens), int(b * tokens), 0) for a, b in SHAPES]
        found += [
            (int(Kind.VERTICAL_SLASH), int(a * tokens), int(b * tokens), 0) for a, b in COLUMNS_AND_DIAGONALS
        ]
        return found + [
            (int(Kind.BLOCKS), max(2, int(share * tokens) // self.block_tokens), 1, 1) for share in BLOCKS
        ]


def _better(
    mass: float, density: float, best: tuple[tuple[int, int, int, int], float, float], wanted: float
) -> bool:
    """Enough mass at the lowest density; without enough, the most mass."""
    _, best_mass, best_density = best
    if mass >= wanted and best_mass >= wanted:
        return density < best_density
    return mass > best_mass
