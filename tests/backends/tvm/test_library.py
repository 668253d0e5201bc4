"""Artifacts with the kernel library linked in, and what becomes of them where it cannot be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.backends.tvm import backend
from memcompile.backends.tvm.kernels.library_attention import SYMBOL
from memcompile.errors import MemcompileError
from memcompile.program import Program
from memcompile.rewrite.manager import apply
from memcompile.runtime import BaseSession
from tests.backends.tvm.build import session_of
from tests.models import captured_tiny, tiny_model
from tests.rewrite.tiny import entry

TOLERANCE = 5e-6  # float32 sums in another order, logits of size 1
# one pattern a layer; the prompt of 150 tokens is three blocks
SPARSE: list[dict[str, Any]] = [
    {"selector": "shape", "first_tokens": 8, "local_tokens": 20},
    {"selector": "blocks", "keep_tokens": 64, "first_tokens": 0, "local_tokens": 0},
    {"selector": "antidiagonal", "stride_tokens": 8, "keep_mass": 0.5},
    {"selector": "vertical_slash", "columns": 4, "diagonals": 4},
]


def tokens(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return [int(t) for t in torch.randint(3, 128, (count,), generator=generator)]


def agrees(program: Program, session: BaseSession, prompt: list[int]) -> np.ndarray:
    """Compare prefill and decoding with the torch program; gives the prompt's logits."""
    judge = TorchSession(program)
    expected_state, state = judge.new_state(1), session.new_state(1, len(prompt), 4)
    (expected,) = judge.prefill(expected_state, [prompt], all_logits=True)
    (got,) = session.prefill(state, [prompt], all_logits=True)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    for token in (5, 9, 60, 3):
        given = np.array([token])
        np.testing.assert_allclose(
            session.decode(state, given), judge.decode(expected_state, given), atol=TOLERANCE
        )
    result: np.ndarray = got
    return result


def linked(folder: Path) -> bool:
    return SYMBOL.encode() in (folder / "model.so").read_bytes()


def test_keys_chosen_at_run_time_are_those_of_the_torch_program(tmp_path: Path) -> None:
    captured = captured_tiny("llama", num_hidden_layers=len(SPARSE))
    dense = tiny_model("llama", num_hidden_layers=len(SPARSE))
    apply(
        captured.graph,
        [
            entry("attention.sparse", layers=str(layer), dense_tokens=32, block_tokens=64, **values)
            for layer, values in enumerate(SPARSE)
        ],
    )
    program, session = session_of(captured, tmp_path / "out", chunk_tokens=256)
    assert linked(tmp_path / "out")
    prompt = tokens(150)
    logits = agrees(program, session, prompt)
    with torch.no_grad():
        everything = dense(torch.tensor([prompt])).logits[0]
    # something was left out: otherwise this would show nothing
    assert np.abs(logits - everything.numpy()).max() > 100 * TOLERANCE


def test_without_the_library_attention_is_a_kernel_of_tvm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_library", lambda: None)
    kinds = ["sliding_attention", "full_attention"]
    captured = captured_tiny("gemma3", num_hidden_layers=2, layer_types=kinds)
    program, session = session_of(captured, tmp_path / "out")
    assert not linked(tmp_path / "out")
    agrees(program, session, tokens(41))


def test_without_the_library_keys_cannot_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_library", lambda: None)
    captured = captured_tiny("llama")
    apply(captured.graph, [entry("attention.sparse", dense_tokens=32)])
    with pytest.raises(MemcompileError, match="MC203 attention of 4 heads of 16 channels chooses its keys"):
        session_of(captured, tmp_path / "out")
