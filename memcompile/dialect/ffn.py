"""`memcompile::sparse_ffn`: a gated feed-forward layer that computes some of its neurons while decoding.

Shapes: B batch, T tokens, M model width, F neurons. A neuron i adds act(gate_i . x) * (up_i . x) * down_i.
Which ones are computed is chosen for every token, those with the largest |act(gate_i . x)| (Li et al. 2022,
The Lazy Neuron Phenomenon, arXiv:2210.06313), or once, while the prompt is read: those that are among the
most active for most of its tokens (Wang et al. 2024, CoreInfer, arXiv:2410.18311).
"""

from __future__ import annotations

import ctypes

import torch

from memcompile.dialect.cpu_attention import cpu_library
from memcompile.dialect.op import Cost, DialectOp, differentiate_through_definition, register
from memcompile.kernels import CFfn

# in the order of csrc/ffn.h
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# of a prompt's tokens, every so many are counted: neighbours are active alike
COUNT_EVERY = 8


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation by its name, one of `ACTIVATIONS`."""
    if activation.startswith("gelu"):
        return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return torch.nn.functional.silu(x) if activation == "silu" else torch.relu(x)


def largest_neurons(score: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` largest of the last axis as bool; of equal ones the first."""
    if keep >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)


def sparse_ffn_definition(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    activation: str,
    keep: int,
    choosing: bool = False,
) -> torch.Tensor:
    """The layer's output [B,T,M]; gate, up and down are [F,M], a row of `down` is what a neuron adds.

    With `choosing`, a call of one token computes `keep` neurons: those with the largest `counts` [B,F], or
    without counts those that are most active. A row that nothing was counted for computes all of them.
    """
    active = activate(torch.nn.functional.linear(x, gate), activation)
    hidden = active * torch.nn.functional.linear(x, up)
    if choosing and x.shape[1] == 1:
        if counts is None:
            chosen = largest_neurons(active.abs(), keep)
        else:
            chosen = largest_neurons(counts, keep) | (counts.sum(dim=1, keepdim=True) == 0)
            chosen = chosen.unsqueeze(1)
        hidden = hidden.masked_fill(~chosen, 0.0)
    return hidden @ down


@torch.library.custom_op("memcompile::sparse_ffn", mutates_args=())
def sparse_ffn(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    activation: str,
    keep: int,
    choosing: bool = False,
) -> torch.Tensor:
    """A gated feed-forward layer, [B,T,M]; see `sparse_ffn_definition`."""
    if choosing and x.shape[1] == 1:
        fast = kernel_ffn(x, gate, up, down, counts, activation=activation, keep=keep)
        if fast is not None:
            return fast
    return sparse_ffn_definition(
        x, gate, up, down, counts, activation=activation, keep=keep, choosing=choosing
    )  # fmt: skip


@sparse_ffn.register_fake
def _(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    activation: str,
    keep: int,
    choosing: bool = False,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


differentiate_through_definition(sparse_ffn, sparse_ffn_definition, tensor_count=5)


def kernel_ffn(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor | None,
    *,
    activation: str,
    keep: int,
    threads: int | None = None,
) -> torch.Tensor | None:
    """One token a row by the kernel library, x [B,1,M]; None when no kernel takes the tensors."""
    weights = (gate, up, down)
    given = [x, *weights, *([] if counts is None else [counts])]
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in given):
        return None
    if any(not t.is_contiguous() for t in weights) or (library := cpu_library()) is None:
        return None
    held = [x.detach().contiguous(), *([] if counts is None else [counts.detach().contiguous()])]
    out = torch.empty_like(held[0])
    call = CFfn(B=x.shape[0], M=x.shape[-1], F=gate.shape[0], keep=keep, x=held[0].data_ptr())
    for name, weight in zip(("gate", "up", "down"), weights, strict=True):
        setattr(call, name, ctypes.c_void_p(weight.data_ptr()))
    if counts is not None:
        call.counts = held[1].data_ptr()
    call.out, call.activation = out.data_ptr(), ACTIVATIONS.index(activation)
    call.threads = torch.get_num_threads() if threads is None else threads
    library.ffn(call)
    return out


def neuron_counts_definition(
    x: torch.Tensor,
    gate: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    *,
    activation: str,
    token_keep: int,
) -> torch.Tensor:
    """For how many tokens each neuron was among the `token_keep` most active, [B,F] float32.

    x [B,T,M]; positions int64 [B or 1,P+T] of all keys, the last T are those of x, -1: padding. Of a call of
    several tokens every `COUNT_EVERY`-th is counted, from the first on; a call of one changes nothing. A
    neuron at rest, whose activation is 0, is never counted.
    """
    if x.shape[1] == 1:
        return past.clone()
    own = positions[:, positions.shape[1] - x.shape[1] :].expand(x.shape[0], x.shape[1])
    counted = (own[:, ::COUNT_EVERY] >= 0).unsqueeze(-1)
    active = activate(torch.nn.functional.linear(x[:, ::COUNT_EVERY], gate), activation)
    chosen = largest_neurons(active.abs(), token_keep) & counted & (active != 0)
    return past + chosen.sum(dim=1).to(past.dtype)


@torch.library.custom_op("memcompile::neuron_counts", mutates_args=())
def neuron_counts(
    x: torch.Tensor,
    gate: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    *,
    activation: str,
    token_keep: int,
) -> torch.Tensor:
    """Counts [B,F] after a call; see `neuron_counts_definition`."""
    return neuron_counts_definition(x, gate, past, positions, activation=activation, token_keep=token_keep)


@neuron_counts.register_fake
def _(
    x: torch.Tensor,
    gate: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    *,
    activation: str,
    token_keep: int,
) -> torch.Tensor:
    return torch.empty_like(past)


def sparse_ffn_cost(*, B: int, M: int, F: int, K: int, counted: bool = False, element_bytes: int = 4) -> Cost:
    """Cost of decoding one token with K of F neurons; without counts every gate is computed."""
    rows = 3 * K if counted else F + 2 * K
    return Cost(flops=2 * B * M * rows, bytes_moved=M * rows * element_bytes, state_bytes=0)


def neuron_counts_cost(*, B: int, F: int) -> Cost:
    """Cost of the counts while decoding: they are read."""
    return Cost(bytes_moved=4 * B * F, state_bytes=4 * B * F)


SPARSE_FFN = register(DialectOp("sparse_ffn", sparse_ffn_definition, sparse_ffn_cost))
NEURON_COUNTS = register(
    DialectOp("neuron_counts", neuron_counts_definition, neuron_counts_cost, state=("counts",))
)
