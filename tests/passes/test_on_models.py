"""Passes on captured models, run step by step: what a rewrite means for generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memcompile.backends.torch import TorchSession
from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.program import build_program
from memcompile.rewrite.entry import PassEntry
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.rewrite.registry import BUILT_IN, load_pass
from tests.models import VOCAB_SIZE, captured_tiny
from tests.rewrite.tiny import entry

FAMILIES = ("llama", "gemma2", "gpt2")
LENGTHS = (1, 63, 64, 65)


def rows_of(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


def calibration(folder: Path) -> CalibrationData:
    return CalibrationData(token_windows(rows_of(512)[0], 128), cache=folder)


def session(
    family: str, entries: Sequence[PassEntry], folder: Path, **options: Any
) -> tuple[TorchSession, RewriteResult]:
    captured = captured_tiny(family)
    result = apply(captured.graph, entries, calibration=calibration(folder), **options)
    return TorchSession(build_program(captured)), result


def generate(one: TorchSession, rows: Sequence[Sequence[int]], steps: int = 4) -> np.ndarray:
    """Logits [1+steps,B,V]: after each prompt, then after given tokens; evicting in between."""
    state = one.new_state(len(rows))
    logits = [np.stack([row[-1] for row in one.prefill(state, rows)])]
    one.compress(state)
    for step in range(steps):
        logits.append(one.decode(state, np.array([5 + step] * len(rows))))
    return np.stack(logits)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_generates_what_the_original_does(family: str, name: str, tmp_path: Path) -> None:
    rows = rows_of(*LENGTHS)
    identity = entry(name, load_pass(name).identity())
    original, _ = session(family, [], tmp_path)
    rewritten, _ = session(family, [identity], tmp_path, strict=False)
    # kept tokens may lie in another order: sums round differently
    np.testing.assert_allclose(generate(rewritten, rows), generate(original, rows), atol=2e-5, rtol=0)


PLANS: dict[str, list[PassEntry]] = {
    "window": [entry("attention.static", window_tokens=6, sink_tokens=2)],
    "blocks": [entry("attention.static", window_tokens=4, block_tokens=2, block_stride=4)],
    "heads": [entry("attention.static", window_tokens=6, heads=[0])],
    "snapkv": [entry("kv.evict", keep_tokens=20, observe_tokens=4)],
    "fraction": [entry("kv.evict", score="recency", keep_fraction=0.5, sink_tokens=1)],
    "knorm": [entry("kv.evict", score="key_norm", keep_tokens=9)],
    "int4": [entry("kv.quantize", bits=4)],
    "all": [
        entry("attention.static", window_tokens=6, sink_tokens=2, layers=0),
        entry("kv.evict", keep_tokens=20, observe_tokens=4),
        entry("kv.quantize", bits=8),
    ],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_of_different_lengths_equal_each_row_alone(family: str, plan: str, tmp_path: Path) -> None:
    one, _ = session(family, PLANS[plan], tmp_path)
    rows = rows_of(*LENGTHS)
    together = generate(one, rows)
    assert np.isfinite(together).all()
    for index, row in enumerate(rows):
        np.testing.assert_allclose(together[:, index], generate(one, [row])[:, 0], atol=5e-5, rtol=0)


def test_a_windowed_cache_holds_window_and_sinks_for_any_prompt(tmp_path: Path) -> None:
    one, _ = session("llama", PLANS["window"], tmp_path)
    for length in (200, 400):
        state = one.new_state(1)
        one.prefill(state, rows_of(length))
        (table,) = state.tables.values()
        assert table.shape[1] == 5 + 2  # the next token is the sixth of its own window


def test_an_evicted_cache_holds_the_budget(tmp_path: Path) -> None:
    one, _ = session("llama", PLANS["snapkv"], tmp_path)
    state = one.new_state(1)
    one.prefill(state, rows_of(100))
    before = state.nbytes
    one.compress(state)
    assert all(keys.shape[2] == 20 for keys, _ in state.caches.values())
    assert state.nbytes < before / 3


def test_recency_keeps_what_streaming_llm_keeps(tmp_path: Path) -> None:
    """Sinks and recent tokens kept after prefill are what a window that never dropped them would see."""
    one, _ = session("llama", [entry("kv.evict", score="recency", keep_tokens=10, sink_tokens=2)], tmp_path)
    state = one.new_state(1)
    (row,) = rows_of(40)
    one.prefill(state, [row])
    full = {region: [c.clone() for c in caches] for region, caches in state.caches.items()}
    one.compress(state)
    kept = [0, 1, *range(32, 40)]
    for region, (keys, values) in state.caches.items():
        np.testing.assert_array_equal(keys.numpy(), full[region][0][:, :, kept].numpy())
        np.testing.assert_array_equal(values.numpy(), full[region][1][:, :, kept].numpy())


def test_a_window_of_the_models_own_is_never_widened(tmp_path: Path) -> None:
    _, result = session("gemma2", [entry("attention.static", window_tokens=64)], tmp_path, strict=False)
    assert len(result.outcomes[0].rewritten) == 2
    assert {refusal.reason for refusal in result.refusals} == {
        "it already sees no more than a window of 8 tokens"
    }


def test_a_plan_file_reaches_the_passes(tmp_path: Path) -> None:
    from memcompile.plan import load_plan

    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "version: 1\n"
        "model: {source: tiny}\n"
        "workload: {prompt_tokens: 64, new_tokens: 8}\n"
        "passes:\n"
        "  - attention.static: {preset: streaming_llm, window_tokens: 12, layers: 0, expect: 1}\n"
        "  - kv.evict: {preset: snapkv, keep_tokens: 40}\n"
        "  - kv.quantize: {bits: 8}\n"
        "data: {calibration: {text: book.txt, tokens: 512}}\n",
        encoding="utf-8",
    )
    (tmp_path / "book.txt").write_text("text", encoding="utf-8")
    _, result = session("llama", load_plan(plan).passes, tmp_path)
    assert [outcome.rewritten for outcome in result.outcomes] == [("0",), ("1",), ("0", "1")]
