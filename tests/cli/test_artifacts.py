"""The whole line on a tiny model: optimize, run, eval, bench, report, explain; and what no artifact gives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memcompile.cli import main
from memcompile.evaluate import METRIC_NAMES
from tests.cli.conftest import Cli
from tests.models import save_tiny

TinyFolder = Callable[[str], Path]

PLAN = """\
version: 1
target: {threads: 1}
workload: {prompt_tokens: 96, new_tokens: 8}
data:
  calibration: {text: calibration.txt, tokens: 256}
  evaluation: {text: book.txt, tokens: 512}
passes:
  - kv.evict: {preset: snapkv, keep_tokens: 48}
  - kv.quantize: {bits: 8}
gates:
  state_bytes: {max: 1MiB}
  perplexity: {max_increase: 50%}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> tuple[Path, dict[str, Any]]:
    """An artifact, and what `optimize --json` printed when it was made."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("book.txt", "calibration.txt"):
        (folder / name).write_text(
            f"{name}: the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8"
        )
    (folder / "plan.yaml").write_text(PLAN, encoding="utf-8")
    printed = folder / "printed.json"
    command = [
        "optimize",
        str(tiny_folder("llama")),
        "--plan",
        str(folder / "plan.yaml"),
        "-o",
        str(folder / "out"),
    ]
    with printed.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        assert main([*command, "--no-source", "--quick", "--json"]) == 0
    return folder / "out", json.loads(printed.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_optimize_prints_the_documented_json(made: tuple[Path, dict[str, Any]]) -> None:
    artifact, printed = made
    assert printed["schema"] == 1
    assert printed["artifact"] == str(artifact)
    assert [(gate["name"], gate["passed"]) for gate in printed["gates"]] == [
        ("perplexity", True),
        ("state_bytes", True),
    ]
    for gate in printed["gates"]:
        assert {"name", "wanted", "got", "passed"} <= set(gate)
    for role in ("original", "rewritten"):
        assert set(METRIC_NAMES) <= set(printed[role])
    assert printed["rewritten"]["state_bytes"] < printed["original"]["state_bytes"] / 4


@pytest.mark.slow
def test_an_unmet_gate_shows_the_numbers_and_leaves_nothing(
    cli: Cli, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    plan, out = made[0].parent / "plan.yaml", tmp_path / "unmet"
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    answer = cli(
        "optimize", model, "--plan", plan, "-o", out, "--no-source", "--quick", "--json",
        "--set", "gates.state_bytes.max=1KiB",
    )  # fmt: skip
    assert answer.exit_code == 5
    assert answer.json["error"]["code"] == "MC401"
    assert answer.json["artifact"] is None
    (unmet,) = [gate for gate in answer.json["gates"] if not gate["passed"]]
    assert (unmet["name"], unmet["wanted"]) == ("state_bytes", 1024)
    assert unmet["got"] == answer.json["rewritten"]["state_bytes"]
    assert not out.exists()


@pytest.mark.slow
def test_run_continues_a_prompt(cli: Cli, made: tuple[Path, dict[str, Any]]) -> None:
    answer = cli("run", made[0], "--prompt", "the quick", "--max-new-tokens", "5", "--json")
    assert answer.exit_code == 0
    assert 1 <= len(answer.json["tokens"]) <= 5
    streamed = cli("run", made[0], "--prompt", "the quick", "--max-new-tokens", "5")
    assert streamed.out == answer.json["text"] + "\n"


@pytest.mark.slow
def test_run_refuses_prompts_that_do_not_fit(cli: Cli, made: tuple[Path, dict[str, Any]]) -> None:
    for prompt, code in (("", "MC131"), ("x" * 600, "MC130")):
        answer = cli("run", made[0], "--prompt", prompt, "--json")
        assert (answer.exit_code, answer.json["error"]["code"]) == (2, code)


@pytest.mark.slow
def test_eval_measures_again(
    cli: Cli, made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # from another folder: the text is found all the same
    monkeypatch.chdir(tmp_path)
    answer = cli("eval", made[0], "--quick", "--json")
    assert answer.exit_code == 0
    assert set(METRIC_NAMES) <= set(answer.json["rewritten"])
    assert "original" not in answer.json
    assert answer.json["rewritten"]["perplexity"] == pytest.approx(
        made[1]["rewritten"]["perplexity"], rel=1e-4
    )
    # perplexity's increase needs the original; the state does not
    assert [gate["name"] for gate in answer.json["gates"]] == ["state_bytes"]


@pytest.mark.slow
def test_bench_has_a_row_for_each_length(cli: Cli, made: tuple[Path, dict[str, Any]]) -> None:
    lengths = ("--prompt-tokens", "64", "--prompt-tokens", "32")
    answer = cli("bench", made[0], *lengths, "--new-tokens", "4", "--json")
    assert [row["prompt_tokens"] for row in answer.json["lengths"]] == [32, 64]
    for row in answer.json["lengths"]:
        assert min(row["prefill_seconds"], row["decode_seconds_per_token"]) > 0
    assert "prompt tokens" in cli("bench", made[0], *lengths, "--new-tokens", "4").out


@pytest.mark.slow
def test_report_repeats_what_was_measured(cli: Cli, made: tuple[Path, dict[str, Any]]) -> None:
    answer = cli("report", made[0], "--json")
    assert answer.json["rewritten"]["perplexity"] == made[1]["rewritten"]["perplexity"]
    shown = cli("report", made[0]).out
    assert "perplexity" in shown
    assert "report.html" in shown


@pytest.mark.slow
def test_explain_says_how_an_artifact_was_made(cli: Cli, made: tuple[Path, dict[str, Any]]) -> None:
    answer = cli("explain", made[0], "--json")
    assert [entry["pass"] for entry in answer.json["passes"]] == ["kv.evict", "kv.quantize"]
    assert [region["summary"] for region in answer.json["regions"]] == ["keeps 48 tokens, int8"] * 2
    assert "keep_tokens 48" in " ".join(cli("explain", made[0]).out.split())


@pytest.mark.slow
def test_eval_without_its_text_asks_for_one(cli: Cli, made: tuple[Path, dict[str, Any]], text: Path) -> None:
    book = made[0].parent / "book.txt"
    hidden = book.rename(book.with_suffix(".hidden"))
    try:
        answer = cli("eval", made[0], "--quick", "--json")
        assert (answer.exit_code, answer.json["error"]["code"]) == (2, "MC121")
        assert "--text" in answer.json["error"]["fix"]
        assert cli("eval", made[0], "--quick", "--text", text, "--json").exit_code == 0
    finally:
        hidden.rename(book)


@pytest.mark.parametrize("command", [["eval"], ["bench"], ["report"], ["explain"]])
def test_no_artifact_is_exit_code_6(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    answer = cli(*command, tmp_path / "missing", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (6, "MC501")
