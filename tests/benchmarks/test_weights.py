"""The table and the verdicts of benchmarks/weights.py, from made-up readings."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.weights import markdown, rows_of, targets


def result(**quality: float) -> dict[str, Any]:
    """Two turns of three sides; the second turn was twice as slow for all of them."""
    speeds = {"fp32": 0.020, "gguf_int8": 0.008, "openvino": 0.010}
    perplexities = {"fp32": 30.0, "gguf_int8": 30.1, **quality}
    return {
        "sides": list(speeds),
        "weight_bytes": dict.fromkeys(speeds, 2**20),
        "quality": {
            side: {"perplexity": value, "kl": 0.0, "same_top_token": 1.0}
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
    assert heading[7:9] == ["a token", "/ openvino"]
    assert ours[7:9] == ["12.0 ms", "0.80 (0.80–0.80)"]
    assert rival[8] == "1.00 (1.00–1.00)"


def test_sides_without_a_quality_show_a_dash() -> None:
    assert markdown(result()).splitlines()[-1].startswith("| openvino | 1 | – | – | – |")


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
