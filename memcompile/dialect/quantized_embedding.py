"""`memcompile::quantized_embedding`: rows of a table that is stored as 3-, 4- or 8-bit codes."""

from __future__ import annotations

import torch

from memcompile.dialect.op import Cost, DialectOp, differentiate_through_definition, register
from memcompile.dialect.quantized_weights import dequantize, stored_bytes


def quantized_embedding_definition(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bits: int,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `indices` [...] of a table [V,width] stored as `quantized_weights` says; `dtype` [...,width]."""
    return dequantize(
        codes[indices],
        scales[indices],
        None if zero_points is None else zero_points[indices],
        None if offsets is None else offsets[indices],
        bits,
        width,
        dtype,
        table,
    )


@torch.library.custom_op("memcompile::quantized_embedding", mutates_args=())
def quantized_embedding(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bits: int,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Look rows up; see `quantized_embedding_definition` for the shapes."""
    return quantized_embedding_definition(
        indices, codes, scales, zero_points, offsets, table, bits, width, dtype
    ).contiguous()


@quantized_embedding.register_fake
def _(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bits: int,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return scales.new_empty((*indices.shape, width), dtype=dtype)


differentiate_through_definition(quantized_embedding, quantized_embedding_definition, tensor_count=6)


def quantized_embedding_cost(
    *,
    tokens: int,
    K: int,
    block: int,
    bits: int,
    zero_points: bool = False,
    offsets: bool = False,
    table: bool = False,
    element_bytes: int = 4,
) -> Cost:
    rows = stored_bytes(tokens, K, block, bits, zero_points=zero_points, offsets=offsets, table=table)
    return Cost(flops=2 * tokens * K, bytes_moved=rows + tokens * K * element_bytes)


QUANTIZED_EMBEDDING = register(
    DialectOp("quantized_embedding", quantized_embedding_definition, quantized_embedding_cost)
)
