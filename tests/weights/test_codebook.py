"""Tables by k-means: the best one where it is known, what a weight loses, and what its inputs change."""

from __future__ import annotations

import itertools

import pytest
import torch

from memcompile.dialect.quantized_weights import unpack
from memcompile.weights.codebook import cluster, codebook, quantize_without_data
from memcompile.weights.methods import quantize


def loss(values: torch.Tensor, counts: torch.Tensor, centres: torch.Tensor) -> float:
    nearest = (values[:, None] - centres.double()).square().amin(1)
    return float((counts * nearest).sum())


def least_loss(values: torch.Tensor, counts: torch.Tensor, clusters: int) -> float:
    """Of all ways to cut ascending values into intervals."""
    found = []
    for cuts in itertools.combinations(range(1, len(values)), clusters - 1):
        parts = zip((0, *cuts), (*cuts, len(values)), strict=True)
        means = [(counts[a:b] * values[a:b]).sum() / counts[a:b].sum() for a, b in parts]
        found.append(loss(values, counts, torch.stack(means)))
    return min(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_the_centres_are_the_best_ones(seed: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(11, generator=generator, dtype=torch.float64).sort().values
    counts = torch.randint(1, 9, (11,), generator=generator).double()
    found = cluster(values, counts, clusters)
    assert torch.equal(found, found.sort().values)
    assert loss(values, counts, found) == pytest.approx(least_loss(values, counts, clusters), rel=1e-9)


def test_groups_of_values_are_found_exactly() -> None:
    # golden: three groups far apart; the middle one's mean is weighted
    values = torch.tensor([-9.0, -8.0, 0.0, 1.0, 20.0])
    counts = torch.tensor([1.0, 1.0, 3.0, 1.0, 5.0])
    torch.testing.assert_close(
        cluster(values, counts, 3), torch.tensor([-8.5, 0.25, 20.0], dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_few_values_are_kept_as_they_are() -> None:
    weight = torch.tensor([-1.0, -0.5, 0.25, 1.0])[torch.randint(0, 4, (6, 64))]
    weight[:, ::32] = 2.0
    for bits in (3, 4):
        torch.testing.assert_close(
            codebook(weight, bits=bits, block=32).dequantized(), weight, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("width", [32, 70])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_weight_has_one_ascending_table_and_the_nearest_codes(bits: int, width: int) -> None:
    weight = torch.randn(300, width)
    found = codebook(weight, bits=bits, block=32)
    assert found.table is not None
    assert found.table.shape == (1 << bits,)
    assert torch.equal(found.table, found.table.sort().values)
    every = found.scales.repeat_interleave(32, 1)[:, :width, None] * found.table
    nearest = (every - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((found.dequantized() - weight).abs(), nearest, atol=1e-6, rtol=0)
    assert set(unpack(found.codes, bits, 32).flatten().tolist()) == set(range(1 << bits))


def test_a_table_loses_less_than_even_steps() -> None:
    weight = torch.randn(400, 256)
    table, even = (
        codebook(weight, bits=4, block=32),
        quantize(weight, bits=4, block=32, zero_point="none", method="rtn"),
    )
    errors = [float((found.dequantized() - weight).pow(2).mean()) for found in (table, even)]
    assert errors[0] < 0.85 * errors[1]
    assert table.nbytes == even.nbytes + 64


def test_errors_of_large_inputs_count_more() -> None:
    weight, moments = torch.randn(200, 128), torch.ones(128)
    moments[::8] = 1000
    plain, weighed = (codebook(weight, bits=3, block=32, moments=m).dequantized() for m in (None, moments))
    errors = [float((moments * (found - weight).pow(2)).mean()) for found in (plain, weighed)]
    assert errors[1] < 0.8 * errors[0]


def test_blocks_of_zeros_stay_zero_and_unused_inputs_do_no_harm() -> None:
    weight = torch.randn(20, 96)
    weight[3], weight[:, 32:64] = 0, 0
    moments = torch.ones(96)
    moments[:32] = 0
    for given in (None, moments, torch.zeros(96)):
        found = codebook(weight, bits=4, block=32, moments=given).dequantized()
        assert torch.isfinite(found).all()
    exact = codebook(weight, bits=4, block=32).dequantized()
    assert float(exact[3].abs().max()) < 0.05


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_other_methods_need_no_table(method: str) -> None:
    weight = torch.randn(8, 64)
    found = quantize_without_data(weight, bits=4, block=32, zero_point="none", method=method)
    wanted = quantize(weight, bits=4, block=32, zero_point="none", method="hqq" if method == "hqq" else "rtn")
    assert found.table is None
    assert torch.equal(found.dequantized(), wanted.dequantized())
