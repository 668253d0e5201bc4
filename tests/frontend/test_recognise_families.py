"""Models of transformers captured without its attention interface: their graphs say enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memcompile.frontend.recognise import recognise, recognise_norms, recognise_rotary
from memcompile.regions import Causal, Padding, Runtime, SlidingWindow, Unmasked, attention_regions
from tests.frontend.graphs import export
from tests.models import WINDOW_TOKENS, example_inputs, tiny_model

WINDOW = SlidingWindow(WINDOW_TOKENS)
TOKENS = WINDOW_TOKENS + 5


class Only(nn.Module):
    """A Hugging Face model as a function of positional tensors, with one tensor as its output."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        values = (first,) if second is None else (first, second)
        config: Any = self.model.config
        extra = {"use_cache": False} if hasattr(config, "use_cache") else {}
        return self.model(**dict(zip(self.names, values, strict=True)), **extra)[0]  # type: ignore[no-any-return]


def shallow(family: str, layers: int) -> nn.Module:
    """The family's tiny model with fewer layers."""
    values: dict[str, Any] = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    if family in ("gemma2", "gemma3"):
        values["layer_types"] = ["sliding_attention", "full_attention"]
    return tiny_model(family, **values)


def _implementation(model: Any, name: str) -> nn.Module:
    model.set_attn_implementation(name)
    return model  # type: ignore[no-any-return]


# one layer is enough where all are alike; test_equal_layers_are_proven_once has more
@pytest.mark.parametrize(
    ("family", "implementation", "masks", "softcap", "norms", "rotary"),
    [
        ("llama", "sdpa", [Causal()] * 2, 0.0, 5, 4),
        ("llama", "eager", [Causal()], 0.0, 3, 2),
        ("qwen2", "sdpa", [Causal()], 0.0, 3, 2),
        ("mistral", "sdpa", [WINDOW], 0.0, 3, 2),
        ("mistral", "eager", [WINDOW], 0.0, 3, 2),
        ("gemma2", "eager", [WINDOW, Causal()], 0.5, 9, 4),
        ("gemma3", "sdpa", [WINDOW, Causal()], 0.0, 13, 4),
        ("gpt2", "eager", [Causal()], 0.0, 0, 0),
        ("phi3", "sdpa", [Causal()], 0.0, 3, 2),
        ("bert", "sdpa", [Unmasked()], 0.0, 0, 0),
        ("vit", "eager", [Unmasked()], 0.0, 0, 0),
    ],
)
def test_finds_every_layer(family, implementation, masks, softcap, norms, rotary):
    inputs = example_inputs(family, tokens=TOKENS)
    model = Only(_implementation(shallow(family, len(masks)), implementation), *inputs)
    args = tuple(inputs.values())
    graph = export(model, args, axes=(0,) if family == "vit" else (0, 1))
    assert recognise(graph, args) == []
    regions = attention_regions(graph)
    assert [r.mask for r in regions] == masks
    assert [r.layer for r in regions] == list(range(len(masks)))
    assert all(r.softcap == pytest.approx(softcap) for r in regions)
    config = model.model.config
    assert all(r.heads == config.num_attention_heads for r in regions)
    assert all(r.kv_heads == getattr(config, "num_key_value_heads", r.heads) for r in regions)
    assert recognise_norms(graph) == norms
    assert recognise_rotary(graph) == rotary
    with torch.no_grad():
        assert (graph(*args) - model(*args)).abs().max() < 1e-5
    targets = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    # nothing of the mask's making is left
    assert not targets & {"aten.le.Tensor", "aten.where.ScalarOther", "aten.softmax.int", "aten.index.Tensor"}


def test_a_padded_batch_of_a_windowed_model_keeps_its_window():
    ids = example_inputs("mistral", tokens=TOKENS)["input_ids"]
    marks = torch.ones_like(ids)
    marks[1, :4] = 0
    model = Only(_implementation(shallow("mistral", 1), "sdpa"), "input_ids", "attention_mask")
    graph = export(model, (ids, marks))
    assert recognise(graph, (ids, marks)) == []
    assert [r.mask for r in attention_regions(graph)] == [WINDOW]
    with torch.no_grad():
        assert (graph(ids, marks) - model(ids, marks)).abs()[marks.bool()].max() < 1e-5


def test_the_padding_of_an_encoder_becomes_positions():
    ids = example_inputs("bert", tokens=TOKENS)["input_ids"]
    marks = torch.ones_like(ids)
    marks[1, 6:] = 0
    model = Only(_implementation(shallow("bert", 1), "sdpa"), "input_ids", "attention_mask")
    graph = export(model, (ids, marks))
    assert recognise(graph, (ids, marks)) == []
    assert [r.mask for r in attention_regions(graph)] == [Padding()]
    with torch.no_grad():
        assert (graph(ids, marks) - model(ids, marks)).abs().max() < 1e-5


def test_a_mask_made_from_position_ids_is_not_proven():
    ids = example_inputs("llama", tokens=TOKENS)["input_ids"]
    positions = torch.arange(TOKENS).expand(2, -1).contiguous()
    model = Only(_implementation(shallow("llama", 1), "sdpa"), "input_ids", "position_ids")
    graph = export(model, (ids, positions))
    assert recognise(graph, (ids, positions)) == []
    # transformers reads packed sequences off position_ids, so this mask is a function of data
    assert [r.mask for r in attention_regions(graph)] == [Runtime()]
    packed = torch.cat((torch.arange(5), torch.arange(TOKENS - 5))).expand(2, -1).contiguous()
    with torch.no_grad():
        for given in (positions, packed):
            assert (graph(ids, given) - model(ids, given)).abs().max() < 1e-5


def test_equal_layers_are_proven_once(monkeypatch):
    from memcompile.frontend.recognise import attention

    calls = []
    original = attention.verify_attention
    monkeypatch.setattr(attention, "verify_attention", lambda *a: calls.append(1) or original(*a))
    ids = example_inputs("llama", tokens=TOKENS)["input_ids"]
    model = Only(_implementation(shallow("llama", 3), "eager"), "input_ids")
    graph = export(model, (ids,))
    assert recognise(graph, (ids,)) == []
    assert len(attention_regions(graph)) == 3
    assert len(calls) == 1
