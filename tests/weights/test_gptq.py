"""GPTQ: products with the calibration inputs change less than by rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memcompile.weights.gptq import gptq
from memcompile.weights.methods import quantize


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
