"""`memcompile::rotary`: rotary position embedding, half-split layout (Su et al. 2021)."""

from __future__ import annotations

import torch

from memcompile.dialect.op import Cost, DialectOp, differentiate_through_definition, register


def rotary_definition(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x * cos + rotate_half(x) * sin` with x [B,H,T,D] and cos, sin [B or 1,T,D]."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


@torch.library.custom_op("memcompile::rotary", mutates_args=())
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (i, i + D/2) of `x` by the angles behind cos and sin."""
    return rotary_definition(x, cos, sin)


@rotary.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


differentiate_through_definition(rotary, rotary_definition, tensor_count=3)


def rotary_cost(*, B: int, H: int, T: int, D: int, element_bytes: int = 4) -> Cost:
    size = B * H * T * D
    return Cost(flops=3 * size, bytes_moved=2 * size * element_bytes)


ROTARY = register(DialectOp("rotary", rotary_definition, rotary_cost))
