from __future__ import annotations

import io

import pytest

from memcompile.cli import progress
from memcompile.cli.progress import Lines, RichProgress
from memcompile.progress import SILENT


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made.monotonic)
    return made


def test_a_log_has_a_line_for_each_stage_that_took_a_while(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines()
    lines.stage("short")
    clock.now = 1.0
    lines.stage("long")
    lines.update(1, 10)
    clock.now = 4.0
    lines.update(5, 10)
    lines.update(6, 10)
    clock.now = 6.0
    lines.close()
    assert capsys.readouterr() == ("", "long: 5 of 10\nlong: 5.0 s\n")


def test_a_terminal_shows_a_bar_and_keeps_long_stages(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    bar = RichProgress()
    bar.stage("capture")
    bar.update(3, 4)
    clock.now = 2.5
    bar.close()
    assert "2.5 s" in terminal.getvalue()


def test_updates_before_any_stage_and_closing_twice_are_harmless() -> None:
    for shown in (Lines(), RichProgress()):
        shown.update(1, 2)
        shown.close()
        shown.close()
    SILENT.stage("x")
    SILENT.update(1, 2)
