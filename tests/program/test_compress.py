"""Which tokens `compress` keeps."""

from __future__ import annotations

import pytest
import torch

from memcompile.program.compress import choose_tokens
from memcompile.program.program import PositionGroup
from memcompile.regions import EvictSpec


class _ByPosition:
    name = "by_position"

    def __call__(
        self, k: torch.Tensor, v: torch.Tensor, observed: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        return positions.unsqueeze(1).float().expand(-1, k.shape[1], -1)


def choose(
    scores: list[list[float]], positions: list[list[int]], **spec: float
) -> tuple[list[list[int]], list[int]]:
    group = PositionGroup("evict", evict=EvictSpec(_ByPosition(), **spec))  # type: ignore[arg-type]
    slots, kept = choose_tokens(torch.tensor(scores).unsqueeze(1), torch.tensor(positions), group)
    rows = [row[:count] for row, count in zip(slots[:, 0].tolist(), kept.tolist(), strict=True)]
    return rows, kept.tolist()


def test_keeps_the_highest_scores_in_the_order_of_their_positions() -> None:
    assert choose([[1, 9, 3, 8, 2]], [[0, 1, 2, 3, 4]], keep_tokens=3) == ([[1, 2, 3]], [3])


def test_protected_tokens_are_kept_whatever_they_score() -> None:
    rows, _ = choose([[0, 9, 8, 7, 0]], [[0, 1, 2, 3, 4]], keep_tokens=3, sink_tokens=1, recent_tokens=1)
    assert rows == [[0, 1, 4]]


def test_a_budget_smaller_than_the_protection_keeps_the_newest_of_it() -> None:
    rows, _ = choose([[0, 0, 0, 0]], [[0, 1, 2, 3]], keep_tokens=2, recent_tokens=4)
    assert rows == [[2, 3]]


def test_a_budget_of_everything_keeps_everything() -> None:
    assert choose([[3, 1, 2]], [[0, 1, 2]], keep_tokens=99) == ([[0, 1, 2]], [3])
    assert choose([[3, 1, 2]], [[0, 1, 2]], keep_fraction=1.0) == ([[0, 1, 2]], [3])


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 4), (0.1, 1), (0.001, 1), (0.99, 7)])
def test_a_fraction_is_of_each_row_and_rounds_up(fraction: float, kept: int) -> None:
    _, counts = choose([[float(i) for i in range(7)]], [list(range(7))], keep_fraction=fraction)
    assert counts == [kept]


def test_empty_slots_are_never_kept() -> None:
    rows, counts = choose([[9, 9, 1, 2]], [[-1, -1, 0, 1]], keep_tokens=3)
    assert (rows, counts) == ([[2, 3]], [2])


def test_rows_of_different_lengths_keep_their_own_counts() -> None:
    rows, counts = choose([[1, 2, 3, 4], [4, 3, 0, 0]], [[0, 1, 2, 3], [0, 1, -1, -1]], keep_fraction=0.5)
    assert (rows, counts) == ([[2, 3], [0]], [2, 1])
