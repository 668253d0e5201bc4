"""A tiny language model captured by hand: a graph with attention nodes of every kind a pass may meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.program import copy_graph
from memcompile.regions import attention_nodes
from memcompile.rewrite.entry import PassEntry
from memcompile.rewrite.registry import load_pass
from memcompile.rewrite.selectors import parse_heads, parse_layers

VOCABULARY = 64


class TinyAttention(nn.Module):
    """One layer; `attributes` are those of `memcompile::attention`."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, attributes: Mapping[str, Any], gated: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.attributes = dict(attributes)
        width = heads * head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp = TinyFeedForward(width) if gated else None

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, tokens = x.shape[0], x.shape[1]
        q, k, v = (
            project(x).reshape(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, _, _ = torch.ops.memcompile.attention(
            q, k, v, positions=positions, mask=mask, scale=self.head_dim**-0.5, **self.attributes
        )
        x = x + self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return x if self.mlp is None else x + self.mlp(x)


class TinyFeedForward(nn.Module):
    """A gated layer of twice the model's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Doubled(nn.Module):
    """A parametrization: the weight that is used is computed from the one that is stored."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


class TinyModel(nn.Module):
    """Tokens and positions [B,T] (-1: padding) to logits [B,T,64]."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        layers: Sequence[Mapping[str, Any]],
        masked: bool,
        gated: bool,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(512, width)
        self.layers = nn.ModuleList(
            TinyAttention(heads, kv_heads, head_dim, given, gated) for given in layers
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.masked = masked

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids) + self.places(position_ids.clamp(min=0))
        mask = (input_ids != 0).unsqueeze(1).unsqueeze(1) if self.masked else None
        for layer in self.layers:
            x = layer(x, position_ids, mask)
        logits: torch.Tensor = self.head(x)
        return logits


def tiny_graph(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    computed: bool = False,
    gated: bool = False,
    each: Mapping[int, Mapping[str, Any]] | None = None,
) -> fx.GraphModule:
    """A captured graph; `each` gives attributes of single layers. Graphs made alike share their weights.

    computed: no weight of a layer, of the embedding or of the head is used as it is stored. gated: with
    feed-forward layers.
    """
    key = (heads, kv_heads, head_dim, layers, dtype, masked, computed, gated, repr(each))
    if key not in _captured:
        _captured[key] = _capture(
            heads, kv_heads, head_dim, layers, dtype, masked, computed, gated, each or {}
        )
    return copy_graph(_captured[key])


_captured: dict[tuple[Any, ...], fx.GraphModule] = {}


def _capture(
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    dtype: torch.dtype,
    masked: bool,
    computed: bool,
    gated: bool,
    each: Mapping[int, Mapping[str, Any]],
) -> fx.GraphModule:
    attributes = [{"region": str(layer), **each.get(layer, {})} for layer in range(layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = TinyModel(heads, kv_heads, head_dim, attributes, masked, gated).eval().to(dtype)
    if computed:
        for part in list(model.modules()):
            if isinstance(part, nn.Linear | nn.Embedding):
                torch.nn.utils.parametrize.register_parametrization(part, "weight", Doubled())
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1, max=512)
    example = {"input_ids": torch.ones(2, 9, dtype=torch.int64), "position_ids": torch.arange(9).expand(2, 9)}
    exported = torch.export.export(
        model, (), example, dynamic_shapes={name: {0: batch, 1: tokens} for name in example}
    ).module(check_guards=False)
    exported.graph.set_codegen(fx.graph.CodeGen())
    graph_module = fx.GraphModule(exported, exported.graph)
    for layer, node in enumerate(attention_nodes(graph_module)):
        node.meta.update(layer=layer, path=f"model.layers.{layer}.self_attn")
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def run(graph_module: fx.GraphModule, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of every row, [T,64] each; the rows go through the graph as one padded batch."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[1] * (longest - len(row))] for row in rows])
    positions = torch.tensor([[*range(len(row)), *[-1] * (longest - len(row))] for row in rows])
    with torch.no_grad():
        logits = graph_module(ids, positions)
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return [logits[index, : len(row)] for index, row in enumerate(rows)]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def calibration(folder: Path, tokens: int = 96, window: int = 32) -> CalibrationData:
    """Calibration data of a few windows, cached in `folder`."""
    return CalibrationData(token_windows(prompts(tokens)[0], window), cache=folder)


def entry(
    name: str,
    config: Any = None,
    *,
    layers: Any = None,
    heads: Any = None,
    expect: int | None = None,
    where: str = "",
    **values: Any,
) -> PassEntry:
    """A plan entry from a config, or from the values of one."""
    return PassEntry(
        name,
        load_pass(name).Config(**values) if config is None else config,
        None if layers is None else parse_layers(layers),
        None if heads is None else parse_heads(heads),
        expect,
        where,
    )
