"""Clipped grids: outputs change less than by rounding to the whole range of a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memcompile.weights.clip import block_moments, clipped
from memcompile.weights.gptq import gptq
from memcompile.weights.methods import quantize
from tests.weights.test_gptq import output_error, problem


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("block", [32, 64])
def test_outputs_change_less_than_by_rounding(block: int, zero_point: Any) -> None:
    weight, inputs = problem()
    # heavy tails are what a clipped range gives up
    weight = weight * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).abs() ** 2
    hessian = inputs.T @ inputs
    rounded = quantize(weight, bits=4, block=block, zero_point=zero_point, method="rtn")
    found = clipped(weight, hessian, bits=4, block=block, zero_point=zero_point)
    assert output_error(weight, inputs, found) < 0.97 * output_error(weight, inputs, rounded)
    assert found.codes.shape == rounded.codes.shape


def test_gptq_gains_from_clipped_grids() -> None:
    weight, inputs = problem()
    weight = weight * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).abs() ** 2
    plain, clipping = (
        gptq(weight, inputs.T @ inputs, bits=4, block=64, zero_point="none", clip=clip)
        for clip in (False, True)
    )
    assert output_error(weight, inputs, clipping) < 0.99 * output_error(weight, inputs, plain)


def test_moments_are_the_diagonal_blocks() -> None:
    matrix = torch.arange(36.0).reshape(6, 6)
    found = block_moments(matrix, 4)
    assert torch.equal(found[0], matrix[:4, :4])
    assert torch.equal(found[1], torch.nn.functional.pad(matrix[4:, 4:], (0, 2, 0, 2)))


def test_a_range_without_data_is_kept_whole() -> None:
    weight, _ = problem()
    found = clipped(weight, torch.zeros(96, 96), bits=8, block=32, zero_point="none")
    rounded = quantize(weight, bits=8, block=32, zero_point="none", method="rtn")
    assert torch.equal(found.codes, rounded.codes)
