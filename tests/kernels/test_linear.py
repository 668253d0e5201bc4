"""The linear kernels against the definition in float64: every instruction set, storage and size."""

from __future__ import annotations

import pytest
import torch

from memcompile.dialect.cpu_linear import kernel_linear, kernel_quantized_linear
from memcompile.dialect.quantized_linear import quantized_linear_definition
from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.kernels import TYPES, CLinear, KernelLibrary
from memcompile.weights.codebook import codebook
from memcompile.weights.methods import quantize

# rows of x: one, an odd few, the last that is few, the first that is many, more than a tile
ROWS = (1, 3, 8, 9, 70)
# widths of the weight: in the middle of a chunk, whole chunks, a filled-up block
SIZES = ((40, 96), (64, 256), (130, 300))
FORMATS = [
    (bits, block, zero) for bits in (4, 8) for block in (32, 128) for zero in ("none", "integer", "float")
]
TABLES = [(bits, block, "table") for bits in (3, 4) for block in (32, 128)]
CASES = [(*format_, activations) for format_ in FORMATS for activations in ("float32", "int8", "bfloat16")]
CASES += [(*format_, activations) for format_ in TABLES for activations in ("float32", "bfloat16")]


def tensors_of(
    weight: QuantizedWeight,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return weight.codes, weight.scales, weight.zero_points, weight.offsets, weight.table


def close(out: torch.Tensor | None, expected: torch.Tensor, tolerance: float) -> None:
    assert out is not None
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, error


@pytest.mark.parametrize(("bits", "block", "zero_point", "activations"), CASES)
def test_codes_follow_the_definition(
    library: KernelLibrary, bits: int, block: int, zero_point: str, activations: str
) -> None:
    for N, K in SIZES:
        if zero_point == "table":
            weight = codebook(torch.randn(N, K), bits=bits, block=block)
        else:
            weight = quantize(torch.randn(N, K), bits=bits, block=block, zero_point=zero_point, method="rtn")  # type: ignore[arg-type]
        tensors = tensors_of(weight)
        bias = torch.randn(N)
        for rows in ROWS:
            x = torch.randn(rows, K)
            expected = quantized_linear_definition(x.double(), *tensors, bias, bits, activations == "int8")
            for threads in (1, 2):
                out = kernel_quantized_linear(
                    x,
                    *tensors,
                    bias,
                    bits,
                    activations=activations,
                    threads=threads,  # type: ignore[arg-type]
                )
                # a value between two codes may be rounded to either
                close(out, expected, {"float32": 2e-6, "int8": 2e-3, "bfloat16": 1e-2}[activations])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_floats_follow_the_definition(library: KernelLibrary, dtype: torch.dtype, activations: str) -> None:
    for N, K in ((5, 7), (64, 64), (130, 301)):
        weight, bias = torch.randn(N, K).to(dtype), torch.randn(N)
        for rows in ROWS:
            x = torch.randn(2, rows, K)
            expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
            out = kernel_linear(x, weight, bias=bias, activations=activations)  # type: ignore[arg-type]
            assert out is not None
            assert out.shape == (2, rows, N)
            close(out, expected, 2e-6 if activations == "float32" else 1e-2)


def test_threads_and_rows_do_not_change_the_result(library: KernelLibrary) -> None:
    weight = quantize(torch.randn(200, 320), bits=4, block=32, zero_point="float", method="rtn")
    tensors = tensors_of(weight)
    x = torch.randn(600, 320)
    one = kernel_quantized_linear(x, *tensors, None, 4, threads=1)
    two = kernel_quantized_linear(x, *tensors, None, 4, threads=2)
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)


def test_what_fills_up_a_block_is_not_read_as_weight(library: KernelLibrary) -> None:
    weight = quantize(torch.randn(40, 40), bits=4, block=32, zero_point="none", method="rtn")
    codes = weight.codes.clone()
    codes.view(40, -1)[:, 20:] = 0xFF
    for activations in ("float32", "int8"):
        for rows in (1, 20):
            x = torch.randn(rows, 40)
            plain = kernel_quantized_linear(
                x, weight.codes, weight.scales, None, None, None, None, 4, activations=activations
            )  # type: ignore[arg-type]
            filled = kernel_quantized_linear(
                x, codes, weight.scales, None, None, None, None, 4, activations=activations
            )  # type: ignore[arg-type]
            assert plain is not None
            assert filled is not None
            assert torch.equal(plain, filled)


def test_a_table_is_not_multiplied_by_int8_inputs(library: KernelLibrary) -> None:
    weight = codebook(torch.randn(8, 64), bits=4, block=32)
    x = torch.randn(1, 64)
    assert kernel_quantized_linear(x, *tensors_of(weight), None, 4, activations="int8") is None
    call = CLinear(M=1, N=8, K=64, block=32, activations=TYPES["int8"], weight_type=TYPES["int4"])
    call.x, call.out = x.data_ptr(), torch.empty(8).data_ptr()
    assert weight.table is not None
    call.weight, call.scales, call.table = (
        tensor.data_ptr() for tensor in (weight.codes, weight.scales, weight.table)
    )
    with pytest.raises(ValueError, match="sizes"):
        library.linear(call)


def test_sizes_no_kernel_takes_are_left_to_the_definition() -> None:
    weight = quantize(torch.randn(8, 64), bits=4, block=16, zero_point="none", method="rtn")
    assert (
        kernel_quantized_linear(torch.randn(1, 64), weight.codes, weight.scales, None, None, None, None, 4)
        is None
    )
    assert kernel_linear(torch.randn(1, 64).half(), torch.randn(8, 64)) is None
