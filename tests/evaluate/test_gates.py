"""Gates: every limit passes and fails where it should; what was not measured never passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from memcompile.errors import MemcompileError
from memcompile.evaluate import Evaluation, EvaluationSettings, Metrics, check, raise_for_gates
from memcompile.evaluate.gates import RULES
from memcompile.evaluate.units import format_bytes, format_ratio, format_seconds


def _evaluation(original: dict[str, Any] | None = None, **rewritten: Any) -> Evaluation:
    return Evaluation(
        original=Metrics(prompt_tokens=64, **original) if original is not None else None,
        rewritten=Metrics(prompt_tokens=64, **rewritten),
        hugging_face=None,
        settings=EvaluationSettings(),
        prediction=None,
        crossovers=(),
        environment={},
    )


MEASURED = _evaluation(
    {"perplexity": 20.0, "prefill_seconds": 6.0, "decode_seconds_per_token": 0.2},
    perplexity=21.0,
    kl=0.05,
    passkey_accuracy=0.8,
    prefill_seconds=4.0,
    decode_seconds_per_token=0.1,
    peak_memory_bytes=1000,
    state_bytes=500,
)


@pytest.mark.parametrize(
    ("name", "limit", "passing", "failing"),
    [
        ("perplexity", "max_increase", 0.06, 0.04),
        ("perplexity", "max", 21.0, 20.9),
        ("kl", "max", 0.05, 0.049),
        ("passkey", "min_accuracy", 0.8, 0.81),
        ("state_bytes", "max", 500, 499),
        ("peak_memory", "max", 1000, 999),
        ("prefill_speedup", "min", 1.5, 1.51),
        ("decode_speedup", "min", 2.0, 2.01),
    ],
)
def test_a_limit_passes_at_the_value_and_fails_beyond_it(
    name: str, limit: str, passing: float, failing: float
) -> None:
    results = check({name: {limit: passing}}, MEASURED)
    assert [result.passed for result in results] == [True]
    raise_for_gates(results)
    results = check({name: {limit: failing}}, MEASURED)
    assert [result.passed for result in results] == [False]
    with pytest.raises(MemcompileError) as caught:
        raise_for_gates(results)
    assert caught.value.code == "MC401"
    assert caught.value.exit_code == 5
    for words in (name, results[0].wanted_text, results[0].got_text):
        assert words in str(caught.value)


def test_every_rule_is_tested_above_and_known_to_the_plan() -> None:
    assert len(RULES) == 8
    schema = pytest.importorskip("memcompile.plan.schema", reason="needs the plan")
    keys = {
        (gate, key)
        for gate, field in schema.Gates.model_fields.items()
        for key in next(each for each in field.annotation.__args__ if each is not type(None)).model_fields
    }
    assert keys == set(RULES)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize(("name", "limit"), sorted(RULES))
def test_what_was_not_measured_does_not_pass(name: str, limit: str, value: float | None) -> None:
    metrics = {
        "perplexity": value, "kl": value, "passkey_accuracy": value, "prefill_seconds": value,
        "decode_seconds_per_token": value, "peak_memory_bytes": value, "state_bytes": value,
    }  # fmt: skip
    wanted = 0.0 if limit.startswith("min") else 1e9
    results = check({name: {limit: wanted}}, _evaluation(metrics, **metrics))
    if value == math.inf and name.endswith("speedup"):
        assert results[0].got is None  # infinity over infinity
    assert not results[0].passed
    assert results[0].got_text == "not measured"
    assert results[0].as_dict()["got"] is None


def test_a_comparison_without_an_original_does_not_pass() -> None:
    results = check({"decode_speedup": {"min": 0.1}}, _evaluation(decode_seconds_per_token=0.1))
    with pytest.raises(MemcompileError, match="not measured") as caught:
        raise_for_gates(results)
    assert "original" in str(caught.value.fix)


def test_all_unmet_gates_are_named_at_once() -> None:
    results = check(
        {"kl": {"max": 0.01}, "state_bytes": {"max": 10}, "passkey": {"min_accuracy": 0.5}}, MEASURED
    )
    with pytest.raises(MemcompileError, match="2 gates are not met") as caught:
        raise_for_gates(results, where="plan.yaml:12")
    message = str(caught.value)
    assert "kl: wanted nats at most 0.01, got 0.05" in message
    assert "state_bytes: wanted at most 10 B, got 500 B" in message
    assert "passkey" not in message
    assert "plan.yaml:12" in message


def test_reads_the_limits_of_a_plan() -> None:
    @dataclass
    class Limit:
        gate: str
        key: str
        value: float

    class Gates:
        def limits(self) -> list[Limit]:
            return [Limit("kl", "max", 0.1), Limit("perplexity", "max_increase", 0.02)]

    assert [(result.name, result.passed) for result in check(Gates(), MEASURED)] == [
        ("kl", True),
        ("perplexity", False),
    ]


def test_no_gates_are_no_results() -> None:
    assert check(None, MEASURED) == []
    assert check({}, MEASURED) == []
    assert check({"kl": {"max": None}}, MEASURED) == []


def test_an_unknown_gate_is_refused_with_the_known_ones() -> None:
    with pytest.raises(MemcompileError, match=r"kl\.min") as caught:
        check({"kl": {"min": 1}}, MEASURED)
    assert caught.value.code == "MC113"
    assert "kl.max" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("value", "text"), [(10, "10 B"), (1024, "1.0 KiB"), (24 * 2**20, "24.0 MiB"), (3 * 2**30, "3.00 GiB")]
)
def test_bytes_are_written_in_binary_units(value: int, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (4.5e-5, "45 us"), (0.12, "120 ms"), (6.314, "6.31 s"), (203.4, "203 s")]
)
def test_durations_keep_three_digits(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(1.5, "1.50x"), (0.048, "0.048x")])
def test_ratios_keep_two_digits(value: float, text: str) -> None:
    assert format_ratio(value) == text
