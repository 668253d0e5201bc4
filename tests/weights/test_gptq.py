"""GPTQ: products with the calibration inputs change less than by rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memcompile.dialect.quantized_weights import in_blocks, unpack
from memcompile.weights.codebook import codebook
from memcompile.weights.gptq import Spread, gptq, gptq_codebook
from memcompile.weights.methods import Grid, quantize


def problem(rows: int = 24, width: int = 96, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N,K], and inputs [T,K] that lie near a few directions, as activations do."""
    generator = torch.Generator().manual_seed(4)
    directions = torch.randn(width // 6, width, generator=generator)
    inputs = torch.randn(tokens, width // 6, generator=generator) @ directions
    inputs += 0.3 * torch.randn(tokens, width, generator=generator)
    return torch.randn(rows, width, generator=generator) * 0.05, inputs


def output_error(weight: torch.Tensor, inputs: torch.Tensor, found: Any) -> float:
    return float((inputs @ (found.dequantized() - weight).T).pow(2).mean())


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_outputs_change_less_than_by_rounding(block: int, zero_point: Any) -> None:
    weight, inputs = problem()
    rounded = quantize(weight, bits=4, block=block, zero_point=zero_point, method="rtn")
    found = gptq(weight, inputs.T @ inputs, bits=4, block=block, zero_point=zero_point)
    assert output_error(weight, inputs, found) < 0.6 * output_error(weight, inputs, rounded)
    assert found.codes.shape == rounded.codes.shape
    assert found.scales.shape == rounded.scales.shape


def test_without_correlation_it_rounds() -> None:
    weight, _ = problem()
    found = gptq(weight, torch.eye(96), bits=4, block=32, zero_point="integer")
    rounded = quantize(weight, bits=4, block=32, zero_point="integer", method="rtn")
    assert torch.equal(found.codes, rounded.codes)
    torch.testing.assert_close(found.scales, rounded.scales)


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    weight, inputs = problem()
    inputs[:, 10:20] = 0
    found = gptq(weight, inputs.T @ inputs, bits=8, block=32, zero_point="none")
    assert torch.isfinite(found.dequantized()).all()
    torch.testing.assert_close(found.dequantized(), weight, atol=0.05, rtol=0)
    silent = gptq(weight, torch.zeros(96, 96), bits=8, block=32, zero_point="none")
    torch.testing.assert_close(silent.dequantized(), weight, atol=0.002, rtol=0)


def test_a_width_that_is_no_multiple_of_the_block() -> None:
    weight, inputs = problem(width=78)
    found = gptq(weight, inputs.T @ inputs, bits=4, block=32, zero_point="integer")
    rounded = quantize(weight, bits=4, block=32, zero_point="integer", method="rtn")
    assert found.dequantized().shape == weight.shape
    assert output_error(weight, inputs, found) < 0.6 * output_error(weight, inputs, rounded)


def test_two_columns_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first column's 0.4 becomes 0; the second takes on 0.4 * H10 / H11, and 0.8 becomes 1."""
    monkeypatch.setattr("memcompile.weights.gptq.DAMP", 0.0)
    one = torch.ones(1, 1, 1)
    grid = Grid(one, 8 * one, 0 * one, bits=4)
    blocks = torch.full((1, 1, 2), 0.4)
    spread = Spread(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), 2)
    assert (spread.codes(blocks, grid) - 8).flatten().tolist() == [0, 1]
    # once the second makes up for the first, what is left of H00 is 2 - 1 * 1 / 1
    torch.testing.assert_close(spread.costs, torch.tensor([1.0, 1.0]))
    # the column of the larger input comes first, wherever it stands
    turned = Spread(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), 2)
    assert (turned.codes(blocks, grid) - 8).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_row_loses_more_than_by_rounding_on_its_grid(seed: int, clip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight, hessian = torch.randn(200, 64, generator=generator), inputs.T @ inputs
    found = gptq(weight, hessian, bits=4, block=16, zero_point="integer", clip=clip)
    assert found.zero_points is not None
    zeros = unpack(found.zero_points, 4, 4).float().unsqueeze(-1)
    scales = found.scales.unsqueeze(-1)
    grid = Grid(scales, zeros, torch.zeros_like(scales), bits=4)
    blocks = in_blocks(weight, 16)
    rounded = grid.weight(grid.codes(blocks)).flatten(1)
    losses = [(((w - weight) @ hessian) * (w - weight)).sum(1) for w in (found.dequantized(), rounded)]
    assert bool((losses[0] <= losses[1] * (1 + 1e-4)).all())
    assert float(losses[0].sum()) < 0.5 * float(losses[1].sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_of_a_table_are_spread_too(bits: int) -> None:
    weight, inputs = problem()
    hessian = inputs.T @ inputs
    plain = codebook(weight, bits=bits, block=32, moments=hessian.diagonal())
    found = gptq_codebook(weight, hessian, bits=bits, block=32)
    assert output_error(weight, inputs, found) < 0.6 * output_error(weight, inputs, plain)
    assert found.nbytes == plain.nbytes
