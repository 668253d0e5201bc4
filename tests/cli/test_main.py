"""Exit codes, errors and the purity of stdout: what every command shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memcompile import pipeline
from memcompile.cli.main import COMMANDS
from memcompile.errors import MemcompileError
from tests.cli.conftest import Cli


def test_help_lists_every_command_and_the_exit_codes(cli: Cli) -> None:
    answer = cli("--help")
    assert answer.exit_code == 0
    assert all(f"\n  {name} " in answer.out for name in COMMANDS)
    assert "5 a gate unmet" in " ".join(answer.out.split())


def test_version(cli: Cli) -> None:
    answer = cli("--version")
    assert answer.exit_code == 0
    assert answer.out.startswith("memcompile, version ")


def test_no_command_shows_the_help_and_is_a_usage_error(cli: Cli) -> None:
    answer = cli()
    assert (answer.exit_code, answer.out) == (2, "")
    assert "Commands:" in answer.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_summary_is_the_commands_own_subject(cli: Cli, name: str) -> None:
    answer = cli(name, "--help")
    assert answer.exit_code == 0
    assert "Usage: memcompile" in answer.out


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        (["optimise"], "no such command: optimise", "did you mean optimize?"),
        (["optimize", "m", "--plan", "p"], "Missing option", "see memcompile optimize --help"),
        (
            ["run", "out", "--prompt", "x", "--top-p", "2"],
            "2.0 is not in the range",
            "see memcompile run --help",
        ),
        (["inspect"], "Missing argument 'MODEL'", "see memcompile inspect --help"),
        (["run", "out"], "no prompt given", "give --prompt TEXT or --prompt-file FILE"),
        (
            ["run", "out", "--prompt", "x", "--prompt-file", "y"],
            "--prompt and --prompt-file given",
            "give --prompt",
        ),
        (["explain"], "nothing to explain", "memcompile explain MODEL --plan plan.yaml"),
    ],
)
def test_a_usage_error_is_mc120_with_exit_code_2(
    cli: Cli, arguments: list[str], message: str, fix: str
) -> None:
    answer = cli(*arguments, "--json")
    error = answer.json["error"]
    assert answer.exit_code == error["exit_code"] == 2
    assert error["code"] == "MC120"
    assert message in error["message"]
    assert fix in error["fix"]
    assert error["message"] in answer.err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("MC102", 2), ("MC203", 3), ("MC301", 4), ("MC401", 5), ("MC503", 6), ("MC901", 1)],
)
def test_the_exit_code_follows_from_the_error(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, code: str, exit_code: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemcompileError(code, "what", where="here", fix="so")

    monkeypatch.setattr(pipeline, "inspect", fail)
    answer = cli("inspect", "model")
    assert answer.exit_code == exit_code
    assert answer.err == f"{code} what\n  where: here\n  fix:   so\n"
    assert answer.out == ""
    assert cli("inspect", "model", "--json").json == {
        "schema": 1,
        "error": {"code": code, "message": "what", "where": "here", "fix": "so", "exit_code": exit_code},
    }


def test_an_unexpected_exception_is_one_line_and_a_traceback_on_demand(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("lost\nfor ever")

    monkeypatch.setattr(pipeline, "inspect", fail)
    answer = cli("inspect", "model")
    assert answer.exit_code == 1
    assert answer.err.startswith("MC901 KeyError: ")
    assert "Traceback" not in answer.err
    assert "--debug" in answer.err
    assert "Traceback" in cli("inspect", "model", "--debug").err
    assert cli("inspect", "model", "--json").json["error"]["code"] == "MC901"


def test_an_interrupt_is_neither_an_error_nor_success(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "inspect", interrupt)
    assert cli("inspect", "model").exit_code == 130


def test_with_json_stdout_is_json_whatever_libraries_print(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(*args: object, **kwargs: object) -> dict[str, object]:
        print("from Python")
        os.write(1, b"from below Python\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        return {"model": "m", "parameters": 1, "regions": [], "refusals": [], "loss": float("nan")}

    monkeypatch.setattr(pipeline, "inspect", chatty)
    answer = cli("inspect", "model", "--json")
    # what is no number is null: NaN is not JSON
    assert answer.json == {
        "schema": 1,
        "model": "m",
        "parameters": 1,
        "regions": [],
        "refusals": [],
        "loss": None,
    }
    for said in ("from Python", "from below Python", "from a child"):
        assert said in answer.err


def test_stdout_is_back_after_a_command_with_json(tmp_path: Path) -> None:
    program = (
        "from memcompile.cli import main; main(['plan', 'check', 'missing.yaml', '--json']); print('back')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    answer, _, rest = done.stdout.rpartition("}\n")
    assert json.loads(answer + "}")["error"]["code"] == "MC110"
    assert rest == "back\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m memcompile --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0
    assert done.stderr == ""
