"""The table and the verdicts of benchmarks/weights.py, from made-up readings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks._weight_sides import measure_quality
from benchmarks.weights import markdown, rows_of, targets


def result(**quality: float) -> dict[str, Any]:
    """Two turns of three sides; the second turn was twice as slow for all of them."""
    speeds = {"fp32": 0.020, "gguf_int8": 0.008, "openvino": 0.010}
    perplexities = {"fp32": 30.0, "gguf_int8": 30.1, **quality}
    return {
        "sides": list(speeds),
        "prompt_tokens": 8000,
        "weight_bytes": dict.fromkeys(speeds, 2**20),
        "quality": {
            side: {"perplexity": value, "kl": 0.0, "same_top_token": 1.0, "passkey": 0.8}
            for side, value in perplexities.items()
        },
        "readings": [
            {
                "side": side,
                "prefill_seconds": 1.0,
                "decode_seconds_per_token": seconds * slow,
                "peak_memory_bytes": 2**30,
            }
            for slow in (1, 2)
            for side, seconds in speeds.items()
        ],
    }


def test_ratios_are_of_readings_of_the_same_turn() -> None:
    heading, _, ours, rival = rows_of(result())
    assert heading[5:10] == ["passkey", "first token", "/ openvino", "a token", "/ openvino"]
    assert ours[5] == "80%"
    assert ours[8:10] == ["12.0 ms", "0.80 (0.80–0.80)"]
    assert rival[9] == "1.00 (1.00–1.00)"


def test_sides_without_a_quality_show_a_dash() -> None:
    assert markdown(result()).splitlines()[-1].startswith("| openvino | 1 | – | – | – | – |")


def test_what_was_not_measured_has_no_columns() -> None:
    heading, *_ = rows_of({**result(), "readings": []})
    assert heading == ["weights", "MiB", "perplexity", "KL", "same top token", "passkey"]
    heading, *rows = rows_of({**result(), "quality": {}})
    assert heading[2:4] == ["first token", "/ openvino"]
    assert {len(row) for row in rows} == {len(heading)}


@pytest.mark.parametrize(
    ("side", "perplexity", "met"),
    [("int8", 30.14, True), ("int8", 30.16, False), ("int4_hqq", 30.8, True), ("int4_hqq", 31.0, False)],
)
def test_quality_targets(side: str, perplexity: float, met: bool) -> None:
    found = targets(result(**{side: perplexity}))
    assert [
        value for name, value in found.items() if name.startswith(side[3] if side == "int8" else "4")
    ] == [met]


def test_the_speed_target_is_against_openvino() -> None:
    slow = result()
    for reading in slow["readings"]:
        if reading["side"] == "gguf_int8":
            reading["decode_seconds_per_token"] *= 2
    name = "GGUF's own codes, int8 activations: a token no slower than OpenVINO GenAI"
    assert targets(result())[name]
    assert not targets(slow)[name]


@pytest.mark.parametrize(("prompt", "share", "found"), [
    (8000, 0.7, [True]), (8000, 0.9, [False]), (2048, 0.9, []),
])  # fmt: skip
def test_the_memory_target_is_of_long_prompts(prompt: int, share: float, found: list[bool]) -> None:
    peaks = {"gguf_int8_kv8": share, "openvino": 1.0}
    readings = [{"side": side, "peak_memory_bytes": peak * 2**30} for side, peak in peaks.items()]
    told = targets({"quality": {}, "readings": readings, "prompt_tokens": prompt})
    assert list(told.values()) == found


class _Letters:
    """A tokenizer with one token a character, after the begin token 1."""

    chat = None

    def encode(self, text: str) -> list[int]:
        return [1, *(ord(character) % 128 for character in text)]


class _Uniform:
    """A session that finds every token as likely as any other, and keeps what it was asked to read."""

    tokenizer = _Letters()

    def __init__(self, begins: bool) -> None:
        self.rows: list[list[int]] = []
        self.manifest = SimpleNamespace(
            tokenizer=SimpleNamespace(add_bos=begins, chat=None),
            model=SimpleNamespace(vocab_size=128, bos_token_id=1, max_positions=0),
        )

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> Any:
        return SimpleNamespace(chunk_tokens=prompt_tokens)

    def prefill(self, state: Any, rows: Any, *, on_logits: Any) -> None:
        self.rows += rows
        for first in range(0, len(rows[0]), state.chunk_tokens):
            count = min(state.chunk_tokens, len(rows[0]) - first)
            on_logits(0, first, np.zeros((count, 128), np.float32))


@pytest.mark.parametrize("begins", [True, False])
def test_quality_is_of_windows_that_begin_as_the_model_wants(
    begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _Uniform(begins)
    monkeypatch.setattr("memcompile.runtime.load", lambda *_, **__: session)
    found = measure_quality(tmp_path, None, tmp_path, 2, 0, 1)
    again = measure_quality(tmp_path, tmp_path, None, 2, 0, 1)
    assert found.perplexity == pytest.approx(128, rel=1e-6)
    assert (again.kl, again.same_top_token, again.passkey) == (0.0, 1.0, None)
    assert [len(row) for row in session.rows] == [512] * 4
    if begins:
        # once a window, and never in the middle of the text
        assert all(row[0] == 1 for row in session.rows)
        assert session.rows[1][1] != 1
