"""`run`: what it asks of a session, and how it streams."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from memcompile import runtime
from memcompile.runtime.generate import Generation
from memcompile.runtime.sampling import Sampling
from tests.cli.conftest import Cli


@dataclass
class FakeSession:
    """Says three tokens and remembers what it was asked."""

    asked: dict[str, Any] = field(default_factory=dict)

    def generate(
        self, prompts: list[str], *, on_token: Callable[[int, int, str], None] | None, **options: Any
    ) -> list[Generation]:
        self.asked |= {"prompts": prompts, **options}
        for token, piece in ((5, "a "), (6, ""), (7, "fox")):
            if on_token is not None:
                on_token(0, token, piece)
        return [Generation((5, 6, 7), "a fox", "length", 4, 0.5, 0.25, 100)]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()

    def load(path: Path, **options: Any) -> FakeSession:
        fake.asked |= {"path": path, **options}
        return fake

    monkeypatch.setattr(runtime, "load", load)
    return fake


def test_streams_the_text_to_stdout_and_times_to_stderr(cli: Cli, session: FakeSession) -> None:
    answer = cli("run", "out", "--prompt", "the quick")
    assert (answer.exit_code, answer.out) == (0, "a fox\n")
    assert "3 tokens; first after 0.50 s, then 250.0 ms each" in answer.err
    assert cli("run", "out", "--prompt", "the quick", "--quiet").err == ""


def test_prints_the_documented_json(cli: Cli, session: FakeSession) -> None:
    assert cli("run", "out", "--prompt", "x", "--json").json == {
        "schema": 1,
        "tokens": [5, 6, 7],
        "text": "a fox",
        "prefill_seconds": 0.5,
        "decode_seconds_per_token": 0.25,
    }


def test_is_greedy_unless_told_otherwise(cli: Cli, session: FakeSession) -> None:
    cli("run", "out", "--prompt", "x")
    assert session.asked["sampling"] == Sampling()
    assert session.asked["chat"] is False
    assert session.asked["threads"] is None


def test_passes_every_option_on(cli: Cli, session: FakeSession) -> None:
    options = "--max-new-tokens 9 --temperature 0.7 --top-k 40 --top-p 0.9 --seed 3"
    options += " --stop A --stop B --chat --threads 1"
    cli("run", "out", "--prompt", "x", *options.split())
    assert session.asked == {
        "path": Path("out"),
        "threads": 1,
        "prompts": ["x"],
        "max_new_tokens": 9,
        "sampling": Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=3),
        "stop": ("A", "B"),
        "chat": True,
    }


def test_reads_the_prompt_from_a_file_or_from_stdin(
    cli: Cli, session: FakeSession, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("run", "out", "--prompt-file", text)
    assert session.asked["prompts"] == [text.read_text(encoding="utf-8")]
    monkeypatch.setattr("sys.stdin", io.StringIO("typed"))
    cli("run", "out", "--prompt", "-")
    assert session.asked["prompts"] == ["typed"]


def test_a_prompt_file_that_cannot_be_read_is_mc121(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("missing.txt", "latin.txt"):
        answer = cli("run", "out", "--prompt-file", tmp_path / name, "--json")
        assert (answer.exit_code, answer.json["error"]["code"]) == (2, "MC121")


def test_an_artifact_that_is_not_there_is_exit_code_6(cli: Cli, tmp_path: Path) -> None:
    answer = cli("run", tmp_path / "out", "--prompt", "x", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (6, "MC501")
