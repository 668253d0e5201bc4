"""Bytes and time of a decode step, from made-up manifests and metrics."""

from __future__ import annotations

import pytest

from memcompile.artifact import Manifest, ModelEntry, StepBytes
from memcompile.evaluate import Metrics
from memcompile.evaluate.attribution import Attribution, StepCost, attribute


def manifest(step_bytes: StepBytes | None) -> Manifest:
    return Manifest("toy", ModelEntry("toy"), {}, step_bytes=step_bytes)


def metrics(seconds: float | None, state: int | None = None) -> Metrics:
    return Metrics(prompt_tokens=100, decode_seconds_per_token=seconds, state_bytes_predicted=state)


def test_time_is_shared_out_by_bytes() -> None:
    step = StepCost(StepBytes(6_000_000, 3_000_000, 1_000_000), 0.002)
    assert step.bytes_per_second == 5e9
    seconds = step.as_dict()["seconds"]
    assert seconds == pytest.approx({"weights": 0.0012, "state": 0.0006, "activations": 0.0002})
    assert sum(seconds.values()) == pytest.approx(0.002)


def test_the_predicted_speedup_stands_beside_the_measured_one() -> None:
    found = attribute(
        {"original": manifest(StepBytes(700, 300, 0)), "rewritten": manifest(StepBytes(200, 300, 0))},
        {"original": metrics(0.010), "rewritten": metrics(0.008)},
    )
    assert found is not None
    values = found.as_dict()
    assert values["predicted_speedup"] == 2.0
    assert values["measured_speedup"] == pytest.approx(1.25)
    assert values["bound"].startswith("weights are 70% of the bytes of a decode step and the cache 30%")


def test_the_state_is_that_of_the_prompt_that_was_measured() -> None:
    found = attribute(
        {"rewritten": manifest(StepBytes(700, 300, 5))}, {"rewritten": metrics(0.01, state=900)}
    )
    assert found == Attribution(None, StepCost(StepBytes(700, 900, 5), 0.01))
    assert found.predicted_speedup is None
    assert found.as_dict()["measured_speedup"] is None


@pytest.mark.parametrize(("step_bytes", "seconds"), [(None, 0.01), (StepBytes(1, 1, 1), None)])
def test_nothing_is_said_without_bytes_or_time(step_bytes: StepBytes | None, seconds: float | None) -> None:
    assert attribute({"rewritten": manifest(step_bytes)}, {"rewritten": metrics(seconds)}) is None
