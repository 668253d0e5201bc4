"""The tiny models are what the other tests think they are."""

from __future__ import annotations

import pytest
import torch

from tests.models import (
    CAUSAL_FAMILIES,
    FAMILIES,
    captured_tiny,
    example_inputs,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_is_the_same_each_time(family: str) -> None:
    inputs = example_inputs(family)
    with torch.no_grad():
        first, second = (_tensor(tiny_model(family)(**inputs)) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_causal_families_answer_for_every_token(family: str) -> None:
    with torch.no_grad():
        logits = tiny_model(family)(**example_inputs(family, batch=1, tokens=5)).logits
    assert logits.shape == (1, 5, 128)


def test_overrides_make_another_model() -> None:
    assert len(tiny_model("llama", num_hidden_layers=3).model.layers) == 3
    assert len(tiny_model("llama").model.layers) == 2


def test_a_copy_can_be_changed_without_changing_the_next() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert tiny_model("llama").model.norm.weight.abs().sum() > 0


def test_a_captured_graph_can_be_changed_without_changing_the_next() -> None:
    first = captured_tiny("llama", num_hidden_layers=1)
    for node in reversed(first.graph.graph.nodes):
        if node.op == "call_function":
            node.meta.clear()
    first.graph.register_buffer("added", torch.zeros(1))
    second = captured_tiny("llama", num_hidden_layers=1)
    assert all("val" in node.meta for node in second.graph.graph.nodes if node.op == "call_function")
    assert not hasattr(second.graph, "added")
    assert second.graph.lm_head.weight is first.graph.lm_head.weight


def test_the_tokenizer_gives_back_what_it_was_given() -> None:
    tokenizer = tiny_tokenizer()
    text = "It is a truth,\nuniversally acknowledged."
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def _tensor(output: object) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    found = output[0]  # type: ignore[index]
    assert isinstance(found, torch.Tensor)
    return found
