"""`memcompile tune`: what it takes, tells and forgets. What it measures: tests/tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

SIZES = ("--heads", "4", "--kv-heads", "2", "--width", "16", "--prompt-tokens", "40", "--threads", "1")
SHORT = ("--time-budget", "0.3")


def test_tunes_lists_and_forgets(cli: Cli, tmp_path: Path) -> None:
    database = ("--database", tmp_path / "tuning.json")
    first = cli("tune", *SIZES, *SHORT, *database, "--json").json
    assert first["backend"] == "onnxruntime"
    assert first["workload"] == {"prompt_tokens": 40, "new_tokens": 128, "batch": 1, "threads": 1}
    done = [record["operator"] for record in first["tuned"]]
    assert done[0] == "attention.prefill"
    # whatever the time allowed, the next call goes on
    second = cli("tune", *SIZES, *SHORT, *database, "--json").json
    assert len(second["known"]) == len(done)
    both = ["attention.prefill", "attention.decode"]
    assert [r["operator"] for r in (*second["known"], *second["tuned"])] == both
    assert second["left"] == []
    assert [d["regions"] for d in second["decisions"] if d["tuned"] == "attention"] == ["4/2 heads of 16"]
    shown = cli("tune", *SIZES, *database)
    assert "2 of these were known" in shown.out
    assert "prefill 40: 4/2 heads of 16" in shown.out
    listed = cli("tune", "--list", *database)
    assert listed.out.count(": 4/2 heads of 16") == 2
    assert listed.out.startswith("onnxruntime float32 on ")
    assert ", 1 thread; kernels " in listed.out
    assert cli("tune", "--clear", *database, "--json").json["forgotten"] == 2
    assert "nothing was tuned yet" in cli("tune", "--list", *database).out


def test_the_regions_of_a_model_that_are_alike_are_tuned_once(
    cli: Cli, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ("--prompt-tokens", "40", "--threads", "1", "--database", tmp_path / "tuning.json")
    found = cli("tune", tiny_folder("llama"), *arguments, *SHORT, "--json").json
    problems = [(r["operator"], r["sizes"]["tokens"]) for r in found["tuned"]]
    problems += [(r["operator"], r["sizes"]["tokens"]) for r in found["left"]]
    assert problems == [("attention.prefill", 40), ("attention.decode", 40)]


def test_the_plan_gives_the_workload_and_the_command_line_wins(
    cli: Cli, plan_file: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = plan_file("workload: {prompt_tokens: 48, new_tokens: 5}\ntarget: {backend: torch, threads: 1}\n")
    arguments = ("--heads", "4", "--width", "16", "--database", tmp_path / "tuning.json", *SHORT, "--json")
    found = cli("tune", "--plan", plan, *arguments, "--new-tokens", "9").json
    assert found["backend"] == "torch"
    assert found["workload"] == {"prompt_tokens": 48, "new_tokens": 9, "batch": 1, "threads": 1}
    assert found["tuned"][0]["sizes"]["kv_heads"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "MC120 there is nothing to tune"),
        (("model", "--heads", "4", "--width", "8"), "MC120 model and --heads are given, one is wanted"),
        (("--heads", "4"), "MC120 --heads is given without --width"),
        (("--heads", "4", "--kv-heads", "3", "--width", "8"), "MC120 4 heads do not share 3"),
        ((*SIZES, "--backend", "tvn"), "MC112 backend 'tvn' has nothing to tune"),
        ((*SIZES, "--dtype", "float16"), "MC123 onnxruntime has no attention in float16"),
    ],
)
def test_what_cannot_be_tuned_is_a_usage_error(
    arguments: tuple[str, ...], message: str, cli: Cli, tmp_path: Path
) -> None:
    answer = cli("tune", *arguments, "--database", tmp_path / "tuning.json")
    assert (answer.exit_code, answer.out) == (2, "")
    assert message in answer.err
    assert "fix:" in answer.err


def test_a_damaged_database_is_named(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text("{", encoding="utf-8")
    answer = cli("tune", "--list", "--database", path)
    assert answer.exit_code == 2
    assert "MC122" in answer.err
    assert str(path) in answer.err
