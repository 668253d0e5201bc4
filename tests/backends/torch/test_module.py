"""The torch backend: a drop-in module."""

from __future__ import annotations

import pytest
import torch

from memcompile.backends.torch import RewrittenModule
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from tests.models import example_inputs, tiny_model


def test_is_called_like_the_original_and_answers_like_it() -> None:
    model = tiny_model("llama")
    rewritten = RewrittenModule(capture(model))
    inputs = example_inputs("llama", tokens=19)
    with torch.no_grad():
        want, got = model(**inputs), rewritten(**inputs)
    assert type(got).__name__ == type(want).__name__
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_gradients_are_the_originals(family: str) -> None:
    model = tiny_model(family)
    inputs = example_inputs(family)
    model(**inputs).logits.square().mean().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    RewrittenModule(capture(model))(**inputs).logits.square().mean().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-3, msg=name)


def test_parameters_are_shared_so_training_one_trains_the_other() -> None:
    model = tiny_model("llama")
    rewritten = RewrittenModule(capture(model))
    assert sum(p.numel() for p in rewritten.parameters()) == sum(p.numel() for p in model.parameters())
    inputs = example_inputs("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)  # type: ignore[union-attr,operator]
        torch.testing.assert_close(rewritten(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def test_refuses_inputs_it_was_not_captured_with() -> None:
    rewritten = RewrittenModule(capture(tiny_model("llama")))
    with pytest.raises(MemcompileError, match=r"MC205.*unknown.*inputs_embeds") as caught:
        rewritten(inputs_embeds=torch.zeros(1, 2, 48))
    assert caught.value.fix


def test_bidirectional_models_are_called_like_the_original() -> None:
    model = tiny_model("bert")
    inputs = example_inputs("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        want, got = model(**inputs), RewrittenModule(capture(model))(**inputs)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[seen], want.last_hidden_state[seen], atol=1e-5, rtol=0)
