"""What `optimize` asks of the pipeline, and what it does with the answer. End to end: test_artifacts.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memcompile import pipeline
from memcompile.errors import MemcompileError
from memcompile.plan import Plan
from tests.cli.conftest import Cli

PlanFile = Callable[[str], Path]


class Asked:
    """A pipeline that remembers what it was asked and has no result to give."""

    def __init__(self) -> None:
        self.source: str | None = None
        self.plan: Plan | None = None
        self.options: dict[str, Any] = {}

    def __call__(self, source: str, plan: Plan, out: Path, **options: Any) -> None:
        self.source, self.plan, self.options = source, plan, {"out": out, **options}
        raise MemcompileError("MC509", "no disk", where=str(out), fix="make room")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    pipeline_ = Asked()
    monkeypatch.setattr(pipeline, "optimize", pipeline_)
    return pipeline_


def test_passes_the_plan_with_its_overrides_on(cli: Cli, plan_file: PlanFile, asked: Asked) -> None:
    plan = plan_file("target: {threads: 2}\n")
    answer = cli(
        "optimize",
        "m:f",
        "--plan",
        plan,
        "-o",
        "out",
        "--set",
        "target.threads=1",
        "--set",
        "model.dtype=float16",
    )
    assert answer.exit_code == 6
    assert asked.source == "m:f"
    assert asked.plan is not None
    assert (asked.plan.target.threads, asked.plan.model.dtype, asked.plan.model.source) == (
        1,
        "float16",
        "m:f",
    )
    flags = ("evaluate", "compare_with_source", "quick", "force")
    assert [asked.options[flag] for flag in flags] == [True, True, False, False]
    assert asked.options["out"] == Path("out")


def test_passes_the_flags_on(cli: Cli, plan_file: PlanFile, asked: Asked) -> None:
    options = ("--no-evaluate", "--no-source", "--quick", "--force")
    cli("optimize", "m:f", "--plan", plan_file(""), "--out", "out", *options)
    flags = ("evaluate", "compare_with_source", "quick", "force")
    assert [asked.options[flag] for flag in flags] == [False, False, True, True]


def test_takes_the_model_of_the_plan_if_none_is_named(cli: Cli, plan_file: PlanFile, asked: Asked) -> None:
    cli("optimize", "--plan", plan_file("model: {source: 'package.module:build'}\n"), "-o", "out")
    assert asked.source == "package.module:build"


def test_needs_a_model(cli: Cli, plan_file: PlanFile, asked: Asked) -> None:
    plan = plan_file("version: 1\nmodel: {dtype: float32}\n")
    error = cli("optimize", "--plan", plan, "-o", "out", "--json").json["error"]
    assert (error["code"], error["where"], error["exit_code"]) == ("MC107", f"{plan}:2", 2)


def test_refuses_a_bad_override_before_anything_is_loaded(
    cli: Cli, plan_file: PlanFile, asked: Asked
) -> None:
    answer = cli("optimize", "m:f", "--plan", plan_file(""), "-o", "out", "--set", "target.thread=1")
    assert answer.exit_code == 2
    assert answer.err.startswith("MC108 target.thread: unknown key")
    assert asked.source is None


def test_gates_and_no_evaluate_contradict(cli: Cli, plan_file: PlanFile) -> None:
    plan = plan_file("gates: {state_bytes: {max: 1MiB}}\n")
    answer = cli("optimize", "m:f", "--plan", plan, "-o", "out", "--no-evaluate", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "MC120")
