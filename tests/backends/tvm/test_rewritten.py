"""Rewritten programs, lowered: windows, eviction and codes run as the torch program does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.errors import MemcompileError
from memcompile.rewrite.manager import apply
from tests.backends.tvm.build import session_of
from tests.models import captured_tiny
from tests.rewrite.tiny import calibration, entry

PLANS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "blocks of the past": [
        ("attention.static", {"window_tokens": 8, "sink_tokens": 2, "block_tokens": 4, "block_stride": 3})
    ],
    "window on one head": [("attention.static", {"window_tokens": 8, "sink_tokens": 2, "heads": [0]})],
    "evict": [("kv.evict", {"keep_tokens": 40, "observe_tokens": 16})],
    "evict by norm": [("kv.evict", {"score": "key_norm", "keep_fraction": 0.5})],
    "int4": [("kv.quantize", {"bits": 4})],
    "weights and activations": [("weights.quantize", {"bits": 4})],
    "heads of int8": [
        ("weights.prune", {"granularity": "heads", "criterion": "activation", "sparsity": 0.25}),
        ("kv.quantize", {"bits": 8}),
    ],
    "all three": [
        ("attention.static", {"window_tokens": 8, "sink_tokens": 2, "layers": "every 2"}),
        ("kv.evict", {"keep_tokens": 40, "observe_tokens": 16}),
        ("kv.quantize", {"bits": 8}),
    ],
}
# a value that lies between two codes may round to the other one
TOLERANCE = {"int4": 5e-2, "weights and activations": 5e-3, "heads of int8": 2e-3, "all three": 5e-3}


@pytest.mark.parametrize("name", PLANS)
def test_artifact_and_torch_program_agree(name: str, tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    entries = [entry(pass_name, **config) for pass_name, config in PLANS[name]]
    apply(captured.graph, entries, calibration=calibration(tmp_path))
    program, session = session_of(captured, tmp_path / "out")
    rows = [
        [int(t) for t in torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(count))]
        for count in (70, 45)
    ]
    judge = TorchSession(program)
    expected_state, state = judge.new_state(2, 70, 8), session.new_state(2, 70, 8)
    expected = judge.prefill(expected_state, rows)
    got = session.prefill(state, rows)
    atol = TOLERANCE.get(name, 5e-6)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=atol)
    judge.compress(expected_state)
    session.compress(state)
    for token in range(3, 11):
        tokens = np.array([token, token + 1])
        np.testing.assert_allclose(
            session.decode(state, tokens), judge.decode(expected_state, tokens), atol=atol
        )


def test_four_bits_for_an_odd_number_of_channels_are_refused(tmp_path: Path) -> None:
    captured = captured_tiny("llama", head_dim=18)
    apply(captured.graph, [entry("kv.quantize", bits=4)], calibration=calibration(tmp_path))
    from dataclasses import replace

    from memcompile.backends.tvm.interface import step_interface
    from memcompile.program import build_program

    program = build_program(captured)
    odd = replace(program, states=tuple(replace(s, head_dim=17) for s in program.states))
    with pytest.raises(MemcompileError, match="MC203 region 0 has heads of 17 channels, and 4-bit caches"):
        step_interface(odd)
    assert step_interface(program).states[0].stored_width == 9
