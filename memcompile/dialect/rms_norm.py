"""`memcompile::rms_norm`: root-mean-square normalisation over the last axis (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch

from memcompile.dialect.op import (
    Cost,
    DialectOp,
    accumulate_type,
    differentiate_through_definition,
    register,
)


def rms_norm_definition(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, the statistics in float32 or wider; result in x's type."""
    wide = x.to(accumulate_type(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).to(x.dtype)


@torch.library.custom_op("memcompile::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last axis of `x` by its root mean square and scale by `weight`."""
    return rms_norm_definition(x, weight, eps)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


differentiate_through_definition(rms_norm, rms_norm_definition, tensor_count=2)


def rms_norm_cost(*, tokens: int, M: int, element_bytes: int = 4) -> Cost:
    return Cost(flops=4 * tokens * M, bytes_moved=2 * tokens * M * element_bytes)


RMS_NORM = register(DialectOp("rms_norm", rms_norm_definition, rms_norm_cost))
