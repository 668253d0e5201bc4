"""Quantised weights through TVM: it has no operator for them, so the definitions are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memcompile.backends.torch import TorchSession
from memcompile.program import build_program
from memcompile.rewrite.manager import apply
from tests.backends.tvm.build import session_of
from tests.models import captured_tiny
from tests.rewrite.tiny import entry


@pytest.mark.parametrize(
    "values", [{"bits": 8}, {"bits": 4, "zero_point": "float"}, {"bits": 3, "method": "kmeans"}], ids=str
)
def test_a_quantised_model_agrees_with_the_torch_program(values: dict[str, Any], tmp_path: Path) -> None:
    captured = captured_tiny("llama", tie_word_embeddings=True, num_hidden_layers=1)
    apply(captured.graph, [entry("weights.quantize", block_size=16, activations="float", **values)])
    _, session = session_of(captured, tmp_path / "out")
    judge = TorchSession(build_program(captured))
    row = [5, 60, 7, 80, 9]
    (expected,) = judge.prefill(judge.new_state(1), [row])
    (found,) = session.prefill(session.new_state(1, 8, 4), [row])
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)
