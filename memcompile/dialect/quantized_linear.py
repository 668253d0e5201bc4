"""`memcompile::quantized_linear`: a linear layer whose weight is stored as 3-, 4- or 8-bit codes."""

from __future__ import annotations

import torch

from memcompile.dialect.cpu_linear import Activations, kernel_quantized_linear
from memcompile.dialect.op import (
    Cost,
    DialectOp,
    accumulate_type,
    differentiate_through_definition,
    register,
)
from memcompile.dialect.quantized_weights import block_of, dequantize, stored_bytes


def quantized_linear_definition(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    int8_activations: bool,
) -> torch.Tensor:
    """`x @ weight.T + bias`, x [...,K], weight [N,K] as `quantized_weights` says, result [...,N].

    With `int8_activations` each block of x is first rounded to 127 steps either side of zero, as kernels do
    that multiply codes by codes; gradients pass through that rounding unchanged.
    """
    wide = accumulate_type(x.dtype)
    weight = dequantize(codes, scales, zero_points, offsets, bits, x.shape[-1], wide, table)
    inputs = x.to(wide)
    if int8_activations:
        inputs = inputs + (rounded_activations(inputs, block_of(codes, bits)) - inputs).detach()
    return torch.nn.functional.linear(inputs, weight, None if bias is None else bias.to(wide)).to(x.dtype)


def rounded_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [...,K] with every block of K rounded to int8 steps of its own largest magnitude / 127."""
    width = x.shape[-1]
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(x, (0, blocks * block - width))
    padded = padded.reshape(*x.shape[:-1], blocks, block)
    step = padded.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.round(padded / torch.where(step > 0, step, torch.ones_like(step)))
    rounded: torch.Tensor = (codes * step).flatten(-2)[..., :width]
    return rounded


@torch.library.custom_op("memcompile::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    int8_activations: bool,
) -> torch.Tensor:
    """Multiply `x` by a quantised weight; see `quantized_linear_definition` for the shapes."""
    activations: Activations = "int8" if int8_activations else "float32"
    out = kernel_quantized_linear(
        x, codes, scales, zero_points, offsets, table, bias, bits, activations=activations
    )
    if out is not None:
        return out
    return quantized_linear_definition(
        x, codes, scales, zero_points, offsets, table, bias, bits, int8_activations
    ).contiguous()


@quantized_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    int8_activations: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


differentiate_through_definition(quantized_linear, quantized_linear_definition, tensor_count=7)


def quantized_linear_cost(
    *,
    tokens: int,
    K: int,
    N: int,
    block: int,
    bits: int,
    zero_points: bool = False,
    offsets: bool = False,
    table: bool = False,
    element_bytes: int = 4,
) -> Cost:
    weight = stored_bytes(N, K, block, bits, zero_points=zero_points, offsets=offsets, table=table)
    return Cost(flops=2 * tokens * K * N, bytes_moved=weight + tokens * (K + N) * element_bytes)


QUANTIZED_LINEAR = register(DialectOp("quantized_linear", quantized_linear_definition, quantized_linear_cost))
