"""A captured graph on another device than the one it was traced on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import RewrittenModule, TorchSession
from memcompile.backends.torch.placement import place
from memcompile.program import build_program
from memcompile.rewrite.manager import apply
from tests.models import captured_tiny, example_inputs
from tests.rewrite.tiny import entry


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_no_node_asks_for_the_device_of_the_trace(family: str) -> None:
    # on the meta device any tensor that came from the CPU is an error
    module = RewrittenModule(captured_tiny(family)).to("meta")
    inputs = {name: value.to("meta") for name, value in example_inputs(family).items()}
    try:
        assert module(**inputs).logits.device.type == "meta"
    finally:
        # inner graphs are shared with the next tests' copies of the capture
        place(module.graph_module, torch.device("cpu"))


def test_there_and_back_again_changes_nothing() -> None:
    module = RewrittenModule(captured_tiny("llama"))
    inputs = example_inputs("llama")
    with torch.no_grad():
        want = module(**inputs).logits
        place(module.graph_module, torch.device("meta"))
        place(module.graph_module, torch.device("cpu"))
        assert torch.equal(module(**inputs).logits, want)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("config", [{}, {"window_tokens": 8, "sink_tokens": 2}], ids=str)
def test_on_the_device_module_and_session_agree_with_the_cpu(config: dict[str, Any]) -> None:
    def made() -> Any:
        captured = captured_tiny("llama")
        if config:
            apply(captured.graph, [entry("attention.static", **config)])
        return captured

    inputs = example_inputs("llama", tokens=70)
    with torch.no_grad():
        want = RewrittenModule(made())(**inputs).logits
        moved = RewrittenModule(made()).to("cuda")
        got = moved(**{name: value.to("cuda") for name, value in inputs.items()}).logits
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=0)
    rows = [row.tolist() for row in inputs["input_ids"]]
    judge = TorchSession(build_program(made()))
    session = TorchSession(build_program(made()), "cuda")
    states = judge.new_state(2), session.new_state(2)
    for expected, out in zip(judge.prefill(states[0], rows), session.prefill(states[1], rows), strict=True):
        np.testing.assert_allclose(out, expected, atol=1e-4)
    for token in range(3, 12):
        tokens = np.array([token, token + 1])
        np.testing.assert_allclose(
            session.decode(states[1], tokens), judge.decode(states[0], tokens), atol=1e-4
        )
