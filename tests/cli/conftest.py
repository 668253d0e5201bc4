from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memcompile.cli import main


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which has to be one JSON value and nothing else."""
        value: dict[str, Any] = json.loads(self.out)
        return value


Cli = Callable[..., Answer]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process; stdout and stderr are caught below Python."""

    def run(*arguments: str | Path) -> Answer:
        capfd.readouterr()
        exit_code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Answer(exit_code, out, err)

    return run


@pytest.fixture(scope="session")
def _captures() -> dict[tuple[str, str | None], Any]:
    return {}


@pytest.fixture(autouse=True)
def _each_folder_is_captured_once(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    _captures: dict[tuple[str, str | None], Any],
) -> None:
    """Commands on tiny models share one capture: they work on a copy of its graph."""
    if "tiny_folder" not in request.fixturenames:
        return
    from memcompile import pipeline
    from memcompile.cli import preview
    from memcompile.frontend import capture

    def remembered(source: str, *, dtype: str | None = None, **weights: str) -> Any:
        if (source, dtype) not in _captures:
            # these sources are folders: how a GGUF file's weights are kept does not matter to them
            _captures[source, dtype] = capture(source, dtype=dtype, **weights)
        return _captures[source, dtype]

    for module in (preview, pipeline):
        monkeypatch.setattr(module, "capture", remembered)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text that tiny tokenizers understand."""
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write plan.yaml and return its path."""

    def write(content: str) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(content, encoding="utf-8")
        return path

    return write
