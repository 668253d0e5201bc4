"""Methods of quantising a weight: what each promises of its error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memcompile.weights.methods import METHODS, quantize

ZERO_POINTS = ("none", "integer", "float")


def weight(rows: int = 40, width: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * 0.05 + 0.01


def step_of(found: Any, width: int) -> torch.Tensor:
    """The step of the grid at each weight."""
    block = found.codes.shape[-1] * 8 // found.bits
    return found.scales.abs().repeat_interleave(block, dim=1)[:, :width]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 256])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_rounding_is_off_by_half_a_step_at_most(bits: int, block: int, zero_point: Any) -> None:
    dense = weight()
    found = quantize(dense, bits=bits, block=block, zero_point=zero_point, method="rtn")
    error = (found.dequantized() - dense).abs() / step_of(found, 96)
    # of a block without zero points, values opposite to its extreme have half a step less room; a rounded
    # zero point shifts the grid by up to half a step
    limit = {"none": 1.0, "integer": 1.0, "float": 0.5}[zero_point]
    assert float(error.max()) <= limit + 1e-3
    assert float(error.mean()) < 0.3


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("method", METHODS)
def test_more_bits_are_closer(method: str, zero_point: Any) -> None:
    dense = weight()
    errors = [
        float((quantize(dense, bits=b, block=32, zero_point=zero_point, method=method).dequantized() - dense)
              .pow(2).mean())
        for b in (4, 8)
    ]  # fmt: skip
    assert 0 < errors[1] < errors[0] / 50


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_half_quadratic_is_closer_than_rounding_in_mean_error(zero_point: Any) -> None:
    dense = weight(rows=64, width=256)

    def mean_error(method: str) -> float:
        found = quantize(dense, bits=4, block=32, zero_point=zero_point, method=method)
        return float((found.dequantized() - dense).abs().mean())

    assert mean_error("hqq") < 0.99 * mean_error("rtn")


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("method", METHODS)
def test_extreme_blocks_stay_finite(method: str, zero_point: Any) -> None:
    dense = torch.zeros(4, 64)
    dense[1] = 3.0
    dense[2, 5] = 1e4
    dense[3] = -1e-30
    found = quantize(dense, bits=4, block=32, zero_point=zero_point, method=method).dequantized()
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], torch.zeros(64))
    torch.testing.assert_close(found[2, 5], dense[2, 5], rtol=0.08, atol=0)


def test_a_grid_of_the_same_shape_is_found_again() -> None:
    """A weight that was quantised before, with offsets, is quantised again without loss."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (8, 2, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    scale, shift = torch.rand(8, 2, 1, generator=generator) + 0.1, torch.randn(8, 2, 1, generator=generator)
    dense = (codes * scale + shift).flatten(1)
    found = quantize(dense, bits=4, block=32, zero_point="float", method="rtn")
    torch.testing.assert_close(found.dequantized(), dense, atol=1e-5, rtol=0)


def test_a_weight_is_quantised_alike_in_pieces_and_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from memcompile.weights import methods

    whole = quantize(weight(), bits=4, block=32, zero_point="integer", method="hqq")
    monkeypatch.setattr(methods, "TOGETHER", 96 * 7)
    pieces = quantize(weight(), bits=4, block=32, zero_point="integer", method="hqq")
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scales, pieces.scales)
