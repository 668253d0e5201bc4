"""Masks keep what they say, and the knee is where a curve bends."""

from __future__ import annotations

import pytest
import torch

from memcompile.weights.prune import (
    knee,
    mask_n_of_m,
    mask_of_blocks,
    mask_of_weights,
    pack_mask,
    unpack_mask,
)


def score(rows: int = 12, width: int = 40) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_the_smallest_weights_of_a_matrix_go(sparsity: float) -> None:
    values = score()
    keep = mask_of_weights(values, sparsity, by_row=False)
    assert int((~keep).sum()) == round(sparsity * 480)
    if sparsity > 0:
        assert float(values[~keep].max()) < float(values[keep].min())


def test_by_row_every_row_loses_as_many() -> None:
    keep = mask_of_weights(score(), 0.3, by_row=True)
    assert (~keep).sum(1).tolist() == [12] * 12


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 7)])
def test_n_of_m_neighbours_stay(n: int, m: int) -> None:
    values = score()
    keep = mask_n_of_m(values, n, m)
    whole = 40 // m * m
    groups = keep[:, :whole].reshape(12, -1, m)
    assert (groups.sum(-1) == n).all()
    kept = values[:, :whole].reshape(12, -1, m)
    least = kept.masked_fill(~groups, 2).amin(-1)
    assert (least > kept.masked_fill(groups, -1).amax(-1)).all()
    # the rest keeps its best n as well
    assert (keep[:, whole:].sum(-1) == min(n, 40 - whole)).all()


def test_blocks_go_whole() -> None:
    values = score(10, 22)
    keep = mask_of_blocks(values, 0.5, 4)
    padded = torch.nn.functional.pad(keep.int(), (0, 2, 0, 2), value=-1).reshape(3, 4, 6, 4).transpose(1, 2)
    for block in padded.reshape(18, 16):
        inside = block[block >= 0]
        assert (inside == inside[0]).all()
    assert int((padded.amax((2, 3)) == 1).sum()) == 9


@pytest.mark.parametrize("width", [1, 7, 8, 9, 40])
def test_a_packed_mask_comes_back(width: int) -> None:
    mask = score(5, width) > 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-width // 8))
    assert torch.equal(unpack_mask(packed, width), mask)


def test_the_knee_of_a_curve_that_breaks() -> None:
    sparsities = [step / 10 for step in range(10)]
    losses = [0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1, 0.9, 2.0, 3.0]
    assert knee(sparsities, losses) == 0.6
    assert knee(sparsities, [0.0] * 10) == 0.9
