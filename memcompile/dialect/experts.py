"""`memcompile::experts`: the gated feed-forward experts of a mixture, after routing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from memcompile.dialect.op import Cost, DialectOp, differentiate_through_definition, register


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": functional.relu,
}


def _expert(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, activation: str, transposed: bool
) -> torch.Tensor:
    gate, up = (x @ (gate_up if transposed else gate_up.mT)).chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up) @ (down if transposed else down.mT)


def experts_definition(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    transposed: bool,
) -> torch.Tensor:
    """Sum over the K chosen experts of `weight * down(act(gate(x)) * up(x))`.

    x [N,M], index and weight [N,K], gate_up [E,2F,M], down [E,M,F]; with `transposed` the weights are
    [E,M,2F] and [E,F,M]. Every expert sees every token here, its weight being 0 where it was not chosen.
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        share = (weight * (index == expert)).sum(dim=-1, keepdim=True).to(x.dtype)
        out = out + share * _expert(x, gate_up[expert], down[expert], activation, transposed)
    return out


@torch.library.custom_op("memcompile::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    transposed: bool,
) -> torch.Tensor:
    """Run each expert on the tokens that chose it; see `experts_definition` for the shapes."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.nonzero(index == expert, as_tuple=True)
        if token.numel():
            share = weight[token, slot].unsqueeze(-1).to(x.dtype)
            chosen = _expert(x[token], gate_up[expert], down[expert], activation, transposed)
            out.index_add_(0, token, share * chosen)
    return out


@experts.register_fake
def _(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    transposed: bool,
) -> torch.Tensor:
    return torch.empty_like(x)


differentiate_through_definition(experts, experts_definition, tensor_count=5)


def experts_cost(*, N: int, K: int, E: int, M: int, F: int, element_bytes: int = 4) -> Cost:
    touched = min(E, N * K)
    return Cost(flops=6 * N * K * M * F, bytes_moved=3 * touched * M * F * element_bytes)


EXPERTS = register(DialectOp("experts", experts_definition, experts_cost))
