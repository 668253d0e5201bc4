"""`memcompile::quantized_experts`: gated experts whose weights are stored as 4- or 8-bit codes."""

from __future__ import annotations

import torch

from memcompile.dialect.experts import experts_definition
from memcompile.dialect.op import (
    Cost,
    DialectOp,
    accumulate_type,
    differentiate_through_definition,
    register,
)
from memcompile.dialect.quantized_linear import rounded_activations
from memcompile.dialect.quantized_weights import block_of, dequantize, stored_bytes


def quantized_experts_definition(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up_codes: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zero_points: torch.Tensor | None,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_zero_points: torch.Tensor | None,
    activation: str,
    bits: int,
    int8_activations: bool,
) -> torch.Tensor:
    """`experts` over weights that codes stand for, as `quantized_weights` says; x and result [N,M].

    gate_up [E,2F,M]: rows 2i and 2i+1 are gate and up of channel i, as ONNX Runtime's QMoE reads them; down
    [E,M,F]. With `int8_activations` each block of x is rounded first; gradients pass through unchanged. (A
    kernel rounds what stands between the two products as well.)
    """
    wide = accumulate_type(x.dtype)
    experts, rows = gate_up_codes.shape[:2]
    model = x.shape[-1]
    gate_up = dequantize(gate_up_codes, gate_up_scales, gate_up_zero_points, None, bits, model, wide)
    down = dequantize(down_codes, down_scales, down_zero_points, None, bits, rows // 2, wide)
    halves = gate_up.reshape(experts, rows // 2, 2, model).transpose(1, 2).reshape(experts, rows, model)
    inputs = x.to(wide)
    if int8_activations:
        inputs = inputs + (rounded_activations(inputs, block_of(gate_up_codes, bits)) - inputs).detach()
    return experts_definition(inputs, index, weight.to(wide), halves, down, activation, False).to(x.dtype)


@torch.library.custom_op("memcompile::quantized_experts", mutates_args=())
def quantized_experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up_codes: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zero_points: torch.Tensor | None,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_zero_points: torch.Tensor | None,
    activation: str,
    bits: int,
    int8_activations: bool,
) -> torch.Tensor:
    """Run the chosen experts; see `quantized_experts_definition` for the shapes."""
    return quantized_experts_definition(
        x, index, weight, gate_up_codes, gate_up_scales, gate_up_zero_points,
        down_codes, down_scales, down_zero_points, activation, bits, int8_activations,
    ).contiguous()  # fmt: skip


@quantized_experts.register_fake
def _(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up_codes: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zero_points: torch.Tensor | None,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_zero_points: torch.Tensor | None,
    activation: str,
    bits: int,
    int8_activations: bool,
) -> torch.Tensor:
    return torch.empty_like(x)


differentiate_through_definition(quantized_experts, quantized_experts_definition, tensor_count=9)


def quantized_experts_cost(
    *,
    N: int,
    K: int,
    E: int,
    M: int,
    F: int,
    block: int,
    bits: int,
    zero_points: bool = False,
    element_bytes: int = 4,
) -> Cost:
    one = stored_bytes(2 * F, M, block, bits, zero_points=zero_points, offsets=False)
    one += stored_bytes(M, F, block, bits, zero_points=zero_points, offsets=False)
    moved = min(E, N * K) * one + 2 * N * M * element_bytes
    return Cost(flops=6 * N * K * M * F, bytes_moved=moved)


QUANTIZED_EXPERTS = register(
    DialectOp("quantized_experts", quantized_experts_definition, quantized_experts_cost)
)
