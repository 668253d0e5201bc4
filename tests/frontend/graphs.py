"""Export and recognise small modules, the way the tests of this folder need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from memcompile.frontend.recognise import recognise
from memcompile.regions import AttentionRegion, Refusal, attention_regions

HEADS, WIDTH, MODEL = 4, 8, 32


@dataclass(frozen=True)
class Recognised:
    graph: fx.GraphModule
    refusals: list[Refusal]
    regions: list[AttentionRegion]
    difference: torch.Tensor

    @property
    def region(self) -> AttentionRegion:
        assert not self.refusals, self.refusals
        assert len(self.regions) == 1
        return self.regions[0]

    @property
    def reason(self) -> str:
        assert not self.regions
        assert len(self.refusals) == 1, self.refusals
        return self.refusals[0].reason

    def operations(self) -> set[str]:
        return {str(n.target) for n in self.graph.graph.nodes if n.op == "call_function"}


def export(module: nn.Module, args: tuple[Any, ...], axes: tuple[int, ...] = (0, 1)) -> fx.GraphModule:
    """The un-decomposed graph, with the given axes of every input dynamic."""
    dims = tuple({axis: torch.export.Dim.AUTO for axis in axes if axis < a.ndim} for a in args)
    program = torch.export.export(module, args, dynamic_shapes=dims, strict=False)
    return program.module(check_guards=False)  # type: ignore[return-value]


def run_recognition(module: nn.Module, *args: torch.Tensor, axes: tuple[int, ...] = (0, 1)) -> Recognised:
    """Recognise `module` and compare its output with the original's, also at another length."""
    graph = export(module, args, axes)
    refusals = recognise(graph, args)
    regions = attention_regions(graph)
    with torch.no_grad():
        difference = (module(*args) - graph(*args)).abs()
        if 1 in axes and all(a.ndim > 1 for a in args):
            shorter = tuple(a[:, :-2].contiguous() for a in args)
            assert (
                torch.allclose(module(*shorter), graph(*shorter), atol=1e-5, rtol=0)
                or difference.max() > 1e-5
            )
    return Recognised(graph, refusals, regions, difference)


class Attend(nn.Module):
    """Projects to heads, lets `attend(q, k, v, module, *extra)` mix tokens, and projects back."""

    def __init__(self, attend: Callable[..., torch.Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.kv_heads = kv_heads
        self.q = nn.Linear(MODEL, HEADS * WIDTH)
        self.k = nn.Linear(MODEL, kv_heads * WIDTH)
        self.v = nn.Linear(MODEL, kv_heads * WIDTH)
        self.o = nn.Linear(HEADS * WIDTH, MODEL)
        self.register_buffer("lower", torch.ones(48, 48).tril().view(1, 1, 48, 48))
        flipped = torch.ones(48, 48).tril()
        flipped[40, 3] = 0
        self.register_buffer("flipped", flipped.view(1, 1, 48, 48))
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, WIDTH).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, WIDTH).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, WIDTH).transpose(1, 2)
        out = self.attend(q, k, v, self) if extra is None else self.attend(q, k, v, self, extra)
        return self.o(out.transpose(1, 2).reshape(batch, tokens, -1))


def hidden(batch: int = 2, tokens: int = 11) -> torch.Tensor:
    return torch.randn(batch, tokens, MODEL, generator=torch.Generator().manual_seed(1))


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()
