"""Attention of torch on the CPU as the tuner times it: our kernels against scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from numpy.typing import NDArray

from memcompile.dialect.cpu_attention import kernel_attention
from memcompile.errors import MemcompileError
from memcompile.tuning import KERNELS, Candidate, Opened, Problem, Sizes, Space, space_of
from memcompile.tuning.attention import PREFILL

BACKEND: Final = "torch"
SDPA: Final = "sdpa"
PACKAGES: Final = ("kernels", "torch")
# relative to the largest output; both round each probability to the type
TOLERANCES: Final = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def attention_task(problem: Problem, *, threads: int, dtype: str) -> AttentionTask:
    """The task of a problem; from now on torch has `threads` threads. Raises MC123 for an unknown type."""
    if dtype not in TOLERANCES:
        raise MemcompileError(
            "MC123",
            f"torch's attention is tuned in {', '.join(TOLERANCES)}, not in {dtype}",
            fix="choose one of these types",
        )
    torch.set_num_threads(threads)
    return AttentionTask(problem, threads, dtype)


def _valid(candidate: Candidate, sizes: Sizes) -> bool:
    # sdpa reads floats: a cache of codes would have to be widened first, which is the definition's way
    return candidate.implementation == KERNELS or not sizes["bits"]


@dataclass
class AttentionTask:
    """A prompt is attended in one call, as the rewritten module does."""

    problem: Problem
    threads: int
    dtype: str
    backend: str = BACKEND
    packages: tuple[str, ...] = PACKAGES
    device: None = None

    @property
    def space(self) -> Space:
        return space_of(self.problem.operator, SDPA, valid=_valid)

    @property
    def tolerance(self) -> float:
        return 2e-2 if self.problem.shape.bits else TOLERANCES[self.dtype]

    def open(self, candidate: Candidate) -> Opened:
        """A call over tensors that are made once. Raises ValueError when no kernel takes them."""
        shape = self.problem.shape
        inputs = self.problem.inputs(self.problem.chunk(candidate))
        dtype = getattr(torch, self.dtype)
        q = torch.from_numpy(inputs.q).to(dtype).transpose(1, 2)
        keys, values = (torch.from_numpy(x) for x in (inputs.k, inputs.v))
        if not shape.bits:
            keys, values = keys.to(dtype), values.to(dtype)
        positions = torch.from_numpy(inputs.positions)[None]
        scale = shape.width**-0.5
        if candidate.implementation == KERNELS:
            codes = [_packed(x, shape.bits) for x in (keys, values)]
            channel = None if inputs.scale is None else torch.from_numpy(inputs.scale)
            tuned: dict[str, Any] = {name: candidate.get(name) for name in ("key_tile", "splits")}
            if shape.window:
                tuned |= {name: getattr(shape, name) for name in ("window", "sinks", "block", "stride")}
            return Call(
                lambda: kernel_attention(
                    q, *codes, scale=scale, k_scale=channel, v_scale=channel,
                    positions=positions if shape.window else None, **tuned,
                )
            )  # fmt: skip
        mask = _mask(self.problem, positions, q.shape[2]) if shape.window else None
        causal = mask is None and self.problem.operator == PREFILL
        return Call(
            lambda: torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        )


class Call:
    """A function of tensors, and what it gave last."""

    def __init__(self, function: Callable[[], torch.Tensor | None]) -> None:
        self._function = function
        self._out: torch.Tensor | None = None

    def run(self) -> None:
        self._out = self._function()
        if self._out is None:
            raise ValueError("no kernel takes these tensors")

    def output(self) -> NDArray[Any]:
        assert self._out is not None
        out: NDArray[Any] = self._out.float().numpy()
        return out


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits != 4:
        return codes
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


def _mask(problem: Problem, positions: torch.Tensor, queries: int) -> torch.Tensor:
    shape = problem.shape
    at, keys = positions[0, -queries:, None], positions
    seen = (at - keys < shape.window) | (keys < shape.sinks)
    if shape.stride:
        seen |= (keys // shape.block) % shape.stride == 0
    return seen & (keys <= at)
