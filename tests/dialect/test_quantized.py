"""Quantised weights: their layout, and the two operators against products with what the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.dialect import (
    DIALECT,
    QUANTIZED_EMBEDDING,
    QUANTIZED_LINEAR,
    quantized_embedding,
    quantized_linear,
)
from memcompile.dialect.quantized_linear import quantized_linear_cost, rounded_activations
from memcompile.dialect.quantized_weights import QuantizedWeight, pack, stored_bytes, unpack

EDGES = (1, 63, 64, 65, 200)


def codes_of(
    rows: int,
    width: int,
    *,
    bits: int = 4,
    block: int = 32,
    zero_points: bool = False,
    offsets: bool = False,
    table: bool = False,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows * 7 + width)
    blocks = -(-width // block)
    values = torch.randint(0, 1 << bits, (rows, blocks, block), generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, blocks), generator=generator)
    return QuantizedWeight(
        pack(values, bits),
        torch.rand(rows, blocks, generator=generator) + 0.1,
        pack(zeros, bits) if zero_points else None,
        torch.randn(rows, blocks, generator=generator) if offsets else None,
        bits,
        width,
        torch.randn(1 << bits, generator=generator) if table else None,
    )


def one_by_one(weight: QuantizedWeight) -> torch.Tensor:
    """The weight by its formula, one element at a time, float64 [N,K]."""
    rows, _, size = weight.codes.shape
    block = size * 8 // weight.bits
    out = torch.zeros(rows, weight.in_features, dtype=torch.float64)
    for n in range(rows):
        for k in range(weight.in_features):
            b, i = divmod(k, block)
            if weight.bits == 8:
                code = int(weight.codes[n, b, i])
                zero = 128 if weight.zero_points is None else int(weight.zero_points[n, b])
            elif weight.bits == 3:
                part = weight.codes[n, b, i // 16 * 6 :]
                low = int(part[i % 16 // 4]) >> (2 * (i % 4)) & 3
                code = low + 4 * (int(part[4 + i % 16 // 8]) >> (i % 8) & 1)
            else:
                code = (int(weight.codes[n, b, i // 2]) >> (4 * (i % 2))) & 15
                zero = 8
                if weight.zero_points is not None:
                    zero = (int(weight.zero_points[n, b // 2]) >> (4 * (b % 2))) & 15
            meant = code - zero if weight.table is None else float(weight.table[code])
            value = float(weight.scales[n, b]) * meant
            out[n, k] = value + (0.0 if weight.offsets is None else float(weight.offsets[n, b]))
    return out


FORMATS = [
    {"bits": bits, "block": block, "zero_points": zero_points, "offsets": offsets}
    for bits in (4, 8)
    for block in (16, 64)
    for zero_points, offsets in ((False, False), (True, False), (False, True))
] + [
    {"bits": bits, "block": block, "zero_points": False, "offsets": False, "table": True}
    for bits in (3, 4)
    for block in (16, 64)
]


def arguments(weight: QuantizedWeight) -> tuple[torch.Tensor | None, ...]:
    return weight.codes, weight.scales, weight.zero_points, weight.offsets, weight.table


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([4, 8]), count=st.integers(1, 67))
def test_codes_survive_packing(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.shape[-1] == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), values)


@settings(max_examples=40, deadline=None)
@given(sixteens=st.integers(1, 5), seed=st.integers(0, 99))
def test_codes_of_three_bits_take_three(sixteens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 8, (2, 16 * sixteens), dtype=torch.uint8, generator=generator)
    packed = pack(values, 3)
    assert packed.shape[-1] == 6 * sixteens
    assert torch.equal(unpack(packed, 3, 16 * sixteens - 1), values[:, :-1])


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("width", [16, 63, 65, 200])
def test_codes_stand_for_what_the_formula_says(format_: dict[str, int], width: int) -> None:
    weight = codes_of(5, width, **format_)  # type: ignore[arg-type]
    torch.testing.assert_close(weight.dequantized(torch.float64), one_by_one(weight), atol=1e-12, rtol=0)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_a_weight_takes_the_bytes_it_is_said_to_take(format_: dict[str, int]) -> None:
    weight = codes_of(9, 65, **format_)  # type: ignore[arg-type]
    assert weight.nbytes == stored_bytes(9, 65, **format_)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", EDGES)
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_the_product_is_with_what_the_codes_stand_for(format_: dict[str, int], tokens: int) -> None:
    weight = codes_of(7, 65, **format_)  # type: ignore[arg-type]
    x = torch.randn(2, tokens, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    bias = torch.randn(7, dtype=torch.float64)
    found = quantized_linear(x, *arguments(weight), bias, weight.bits, False)
    torch.testing.assert_close(found, x @ one_by_one(weight).T + bias, atol=1e-9, rtol=0)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_rows_are_looked_up(format_: dict[str, int]) -> None:
    weight = codes_of(11, 65, **format_)  # type: ignore[arg-type]
    indices = torch.tensor([[0, 10, 3], [3, 3, 7]])
    found = quantized_embedding(indices, *arguments(weight), weight.bits, 65, torch.float64)
    torch.testing.assert_close(found, one_by_one(weight)[indices], atol=1e-12, rtol=0)


def test_int8_activations_lose_half_a_step_at_most_and_zero_stays_zero() -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(2)) * 5
    x[1, :32] = 0
    rounded = rounded_activations(x, 32)
    assert torch.equal(rounded[1, :32], torch.zeros(32))
    for begin, end in ((0, 32), (32, 64), (64, 70)):
        part, found = x[:, begin:end], rounded[:, begin:end]
        step = part.abs().amax(dim=-1, keepdim=True) / 127
        assert ((found - part).abs() <= step / 2 * 1.0001).all()
        # the largest magnitude of a block is kept
        largest = part.abs().argmax(dim=-1, keepdim=True)
        torch.testing.assert_close(found.gather(1, largest), part.gather(1, largest))


def test_the_bias_counts_once_and_other_rows_do_not_matter() -> None:
    weight = codes_of(4, 32)
    x = torch.randn(6, 32)
    alone = quantized_linear(x[2:3], *arguments(weight), None, 4, True)
    together = quantized_linear(x, *arguments(weight), None, 4, True)
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("int8", [False, True])
def test_gradients_reach_the_input_the_scales_and_the_bias(int8: bool) -> None:
    weight = codes_of(5, 40, offsets=True)
    x = torch.randn(3, 40, requires_grad=True)
    bias, scales = torch.randn(5, requires_grad=True), weight.scales.clone().requires_grad_(True)
    offsets = weight.offsets
    quantized_linear(x, weight.codes, scales, None, offsets, None, bias, 4, int8).sum().backward()
    dense = weight.dequantized()
    assert x.grad is not None
    assert bias.grad is not None
    assert scales.grad is not None
    # rounding activations passes gradients on unchanged
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(bias.grad, torch.full((5,), 3.0))
    assert float(scales.grad.abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_values_have_the_shape_and_type_of_real_ones(dtype: torch.dtype) -> None:
    weight = codes_of(6, 48)
    x = torch.randn(2, 3, 48, dtype=dtype)
    real = quantized_linear(x, *arguments(weight), None, 4, False)
    rows = quantized_embedding(torch.tensor([[1, 2]]), *arguments(weight), 4, 48, dtype)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in arguments(weight)]
        fake = quantized_linear(mode.from_tensor(x), *fakes, None, 4, False)
        fake_rows = quantized_embedding(mode.from_tensor(torch.tensor([[1, 2]])), *fakes, 4, 48, dtype)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype) == ((2, 3, 6), dtype)
    assert (fake_rows.shape, fake_rows.dtype) == (rows.shape, rows.dtype) == ((1, 2, 48), dtype)


def test_gradients_reach_the_table() -> None:
    weight = codes_of(3, 32, table=True)
    assert weight.table is not None
    table = weight.table.clone().requires_grad_(True)
    x = torch.randn(2, 32)
    quantized_linear(x, weight.codes, weight.scales, None, None, table, None, 4, False).sum().backward()
    code, inputs = unpack(weight.codes, 4, 32).flatten(-2).long(), x.sum(0) * weight.scales
    expected = torch.zeros(16).index_add(0, code.flatten(), inputs.flatten())
    torch.testing.assert_close(table.grad, expected, atol=1e-5, rtol=0)


def test_the_operators_pass_torchs_own_checks() -> None:
    weight = codes_of(4, 32)
    torch.library.opcheck(
        QUANTIZED_LINEAR.target, (torch.randn(2, 32, requires_grad=True), *arguments(weight), None, 4, False)
    )
    torch.library.opcheck(
        QUANTIZED_EMBEDDING.target, (torch.tensor([1, 2]), *arguments(weight), 4, 32, torch.float32)
    )


def test_the_cost_counts_codes_and_scales() -> None:
    cost = quantized_linear_cost(tokens=1, K=64, N=10, block=32, bits=4)
    assert cost.bytes_moved == 10 * (32 + 2 * 4) + (64 + 10) * 4
    with_table = quantized_linear_cost(tokens=1, K=64, N=10, block=32, bits=3, table=True)
    assert with_table.bytes_moved == 10 * (24 + 2 * 4) + 8 * 4 + (64 + 10) * 4
    assert cost.flops == 2 * 64 * 10
    assert {"quantized_linear", "quantized_embedding"} <= set(DIALECT)
