"""Predicted state bytes follow the groups; the crossover is where the rewrite becomes faster."""

from __future__ import annotations

from typing import Any

import pytest

from memcompile.artifact.manifest import EvictEntry, GroupEntry, Manifest, ModelEntry, StateEntry
from memcompile.evaluate.crossover import crossover_lengths, crossovers, faster_from
from memcompile.evaluate.prediction import compare_prediction, predict_state_bytes


def _manifest(group: dict[str, Any], **state: Any) -> Manifest:
    entry = StateEntry("0", "g", 3, 64, "k", "v", "pk", "pv", heads=9, **state)
    return Manifest(
        "onnxruntime", ModelEntry("llama"), {}, states=(entry,), groups=(GroupEntry("g", "mask", **group),)
    )


@pytest.mark.parametrize(
    ("group", "tokens"),
    [
        ({}, 8256),
        ({"evict": EvictEntry(keep_tokens=1024)}, 1024 + 256),
        ({"evict": EvictEntry(keep_tokens=10**6)}, 8256),
        ({"evict": EvictEntry(keep_fraction=0.25)}, 2000 + 256),
        ({"kind": "positions", "window": 252, "sinks": 4}, 256),
        ({"kind": "positions", "window": 10**5}, 8256),
        ({"kind": "positions", "window": 256, "block": 64, "stride": 16}, 256 + 9 * 64),
    ],
)
def test_states_hold_what_can_still_be_seen(group: dict[str, Any], tokens: int) -> None:
    predicted = predict_state_bytes(_manifest(group), prompt_tokens=8000, new_tokens=256, batch=2)
    assert predicted == 2 * tokens * 2 * 3 * 64 * 4


@pytest.mark.parametrize(
    ("bits", "dtype", "width"), [(0, "float32", 256), (0, "float16", 128), (8, "int8", 64), (4, "uint8", 32)]
)
def test_states_count_their_stored_width(bits: int, dtype: str, width: int) -> None:
    manifest = _manifest({}, bits=bits, dtype=dtype)
    assert predict_state_bytes(manifest, prompt_tokens=63, new_tokens=1, batch=1) == 64 * 2 * 3 * width


@pytest.mark.parametrize(
    ("measured", "agrees"), [(1000, True), (1090, True), (1200, False), (910, True), (800, False)]
)
def test_a_disagreement_is_flagged(measured: int, agrees: bool) -> None:
    assert compare_prediction(_manifest({}), predicted=1000, measured=measured, batch=1).agrees is agrees


def test_windows_may_hold_a_chunk_more() -> None:
    manifest = _manifest({"kind": "positions", "window": 252, "sinks": 4})
    token = 2 * 3 * 64 * 4
    assert compare_prediction(manifest, predicted=256 * token, measured=(256 + 512) * token, batch=1).agrees
    assert not compare_prediction(manifest, predicted=256 * token, measured=8000 * token, batch=1).agrees


@pytest.mark.parametrize(
    ("points", "tokens"),
    [
        ([], None),
        ([(100, 0.5), (200, 0.9)], None),
        ([(100, 1.1), (200, 1.2)], 0),
        ([(100, 0.5), (200, 1.5)], 150),
        ([(100, 1.5), (200, 0.5), (300, 1.5)], 250),
        ([(100, float("nan"))], None),
    ],
)
def test_the_crossover_is_where_the_speedup_stays_above_one(
    points: list[tuple[int, float]], tokens: int | None
) -> None:
    assert faster_from(points) == tokens


def test_crossovers_compare_prefill_decode_and_requests() -> None:
    def point(tokens: int, prefill: float, decode: float) -> dict[str, float]:
        return {"prompt_tokens": tokens, "prefill_seconds": prefill, "decode_seconds_per_token": decode}

    original = [point(1000, 1.0, 0.1), point(3000, 3.0, 0.3)]
    rewritten = [point(3000, 4.0, 0.1), point(1000, 2.0, 0.2)]
    found = {each.quantity: each for each in crossovers(original, rewritten, new_tokens=100)}
    assert found["prefill"].tokens is None
    assert found["decode"].tokens == 1400
    assert found["request"].measured == ((1000, 11 / 22), (3000, 33 / 14))
    assert found["request"].as_dict()["measured"][0] == {"prompt_tokens": 1000, "speedup": 0.5}


@pytest.mark.parametrize(("prompt", "lengths"), [(8000, (1000, 3000)), (64, (24,)), (8, ())])
def test_shorter_prompts_are_measured_where_there_is_room(prompt: int, lengths: tuple[int, ...]) -> None:
    assert crossover_lengths(prompt) == lengths
