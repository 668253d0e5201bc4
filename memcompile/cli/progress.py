"""Progress as a person sees it: a bar on a terminal, one line a stage in a log."""

from __future__ import annotations

import sys
import time
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

# a stage that took less is not worth a line of its own
_WORTH_A_LINE_SECONDS: Final = 2.0


class RichProgress:
    """One live line on stderr, and a line left behind for each stage that took a while."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._started = 0.0

    def stage(self, name: str) -> None:
        self._end()
        self._name, self._started = name, time.monotonic()
        self._progress.start()
        self._task = self._progress.add_task(name, total=None)

    def update(self, done: int, total: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._end()
        self._progress.stop()

    def _end(self) -> None:
        if self._task is None:
            return
        self._progress.remove_task(self._task)
        self._task = None
        seconds = time.monotonic() - self._started
        if seconds >= _WORTH_A_LINE_SECONDS:
            self._console.print(f"{self._name} [dim]{seconds:.1f} s[/dim]")


class Lines:
    """A line on stderr for each stage that lasts, written once it has lasted two seconds or is over."""

    def __init__(self) -> None:
        self._name = ""
        self._started = 0.0
        self._shown = False

    def stage(self, name: str) -> None:
        self._end()
        self._name, self._started, self._shown = name, time.monotonic(), False

    def update(self, done: int, total: int) -> None:
        if not self._shown and time.monotonic() - self._started >= _WORTH_A_LINE_SECONDS:
            self._shown = True
            print(f"{self._name}: {done} of {total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._end()

    def _end(self) -> None:
        seconds = time.monotonic() - self._started
        if self._name and seconds >= _WORTH_A_LINE_SECONDS:
            print(f"{self._name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        self._name = ""
