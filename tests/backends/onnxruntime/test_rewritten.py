"""Rewritten programs, lowered: windows, eviction and codes run as the torch program does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.frontend import capture
from memcompile.program import build_program
from memcompile.rewrite.manager import apply
from memcompile.runtime import Session
from tests.backends.onnxruntime.build import session_of
from tests.models import captured_tiny, tiny_model
from tests.rewrite.tiny import calibration, entry

# one of the two layers loses a group of heads
HEADS = {"granularity": "heads", "criterion": "activation", "sparsity": 0.25}
PLANS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "window and sinks": [("attention.static", {"window_tokens": 8, "sink_tokens": 2})],
    "blocks of the past": [
        ("attention.static", {"window_tokens": 8, "sink_tokens": 2, "block_tokens": 4, "block_stride": 3})
    ],
    "window on one head": [("attention.static", {"window_tokens": 8, "sink_tokens": 2, "heads": [0]})],
    "evict": [("kv.evict", {"keep_tokens": 40, "observe_tokens": 16})],
    "evict by norm": [("kv.evict", {"score": "key_norm", "keep_fraction": 0.5})],
    "int8": [("kv.quantize", {"bits": 8})],
    "int4": [("kv.quantize", {"bits": 4})],
    "neurons of every token": [("ffn.sparse", {"keep_fraction": 0.3})],
    "neurons of the prompt": [("ffn.sparse", {"keep_fraction": 0.3, "when": "prefill", "layers": 1})],
    "pages": [("attention.sparse", {"selector": "pages", "keep_tokens": 32, "dense_tokens": 0})],
    "pages of int8": [
        ("attention.sparse", {"selector": "pages", "keep_tokens": 32, "dense_tokens": 50, "layers": 1}),
        ("kv.quantize", {"bits": 8}),
    ],
    "heads": [("weights.prune", HEADS)],
    "heads of int8": [
        ("weights.prune", HEADS),
        ("kv.evict", {"keep_tokens": 40, "observe_tokens": 16}),
        ("kv.quantize", {"bits": 8}),
    ],
    "all three": [
        ("attention.static", {"window_tokens": 8, "sink_tokens": 2, "layers": "every 2"}),
        ("kv.evict", {"keep_tokens": 40, "observe_tokens": 16}),
        ("kv.quantize", {"bits": 8}),
    ],
}
# a value that lies between two codes may round to the other one
TOLERANCE = {"int8": 2e-3, "pages of int8": 2e-3, "heads of int8": 2e-3, "int4": 5e-2, "all three": 5e-3}


# what reads or replaces caches, which a bfloat16 model has in bfloat16 but for those that are evicted
DTYPES = (torch.bfloat16, torch.float32)
NARROW = {name: PLANS[name] for name in ("window and sinks", "evict", "int8", "all three")}


def _entries(plan: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [entry(name, **config) for name, config in plan]


@pytest.mark.parametrize("name", PLANS)
def test_artifact_and_torch_program_agree(name: str, tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    apply(captured.graph, _entries(PLANS[name]), calibration=calibration(tmp_path))
    program, session = session_of(captured, tmp_path / "out")
    agree(TorchSession(program), session, TOLERANCE.get(name, 5e-5))


@pytest.mark.parametrize("name", NARROW)
def test_a_bfloat16_model_is_rewritten_too(name: str, tmp_path: Path) -> None:
    narrow, wide = (capture(tiny_model("llama", num_hidden_layers=4).bfloat16().to(t)) for t in DTYPES)
    for captured in (narrow, wide):
        apply(captured.graph, _entries(PLANS[name]), calibration=calibration(tmp_path))
    _, session = session_of(narrow, tmp_path / "out")
    # the same weights, without rounding of what is computed
    agree(TorchSession(build_program(wide)), session, 2e-2)


def agree(judge: TorchSession, session: Session, atol: float) -> None:
    rows = [
        [int(t) for t in torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(count))]
        for count in (70, 45)
    ]
    expected_state, state = judge.new_state(2, 70, 8), session.new_state(2, 70, 8)
    expected = judge.prefill(expected_state, rows)
    got = session.prefill(state, rows)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=atol)
    judge.compress(expected_state)
    session.compress(state)
    for token in range(3, 11):
        tokens = np.array([token, token + 1])
        np.testing.assert_allclose(
            session.decode(state, tokens), judge.decode(expected_state, tokens), atol=atol
        )


def test_layers_of_different_heads_run_without_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memcompile.runtime.session.find_library", lambda: None)
    test_artifact_and_torch_program_agree("heads of int8", tmp_path)
