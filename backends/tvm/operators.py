"""Torch operators that stand for the TVM kernels while a graph is traced: shapes only, never run."""

from __future__ import annotations

import torch

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

LIBRARY = "memcompile_tvm"


def _unused(*_: object) -> torch.Tensor:
    raise NotImplementedError("this operator is traced for TVM, it is not run in torch")


@torch.library.custom_op(f"{LIBRARY}::cached_attention", mutates_args=())
def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor,
    first_slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    pattern: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
    block: int,
    stride: int,
    softcap: float,
    bits: int,
    pattern_block: int,
    pattern_from: int,
) -> Triple:
    """Write k, v [B,G,T,D] to slots `first_slots` [B] of the caches [B,G,C,W] in place, and attend.

    positions [B,S] of the slots, -1: empty; queries [B,T] are the positions of q [B,H,T,D]. S may be less
    than C: later slots are not read. `pattern` as in `memcompile::attention`. Gives the output [B,H,T,D] and
    the caches.
    """
    return _unused(), _unused(), _unused()


@cached_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor,
    first_slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    pattern: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
    block: int,
    stride: int,
    softcap: float,
    bits: int,
    pattern_block: int,
    pattern_from: int,
) -> Triple:
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    return out, torch.empty_like(cache_k), torch.empty_like(cache_v)


@torch.library.custom_op(f"{LIBRARY}::row_linear", mutates_args=())
def row_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` for x [...,M] and weight [F,M]."""
    return _unused()


@row_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
