"""Where a command's words go: results to stdout, the rest to stderr; with --json stdout is JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from memcompile.errors import MemcompileError
from memcompile.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Output:
    """How this call answers. `stream` is the real stdout, also while libraries print to a diverted one."""

    json: bool
    quiet: bool
    stream: TextIO

    def emit(self, payload: Mapping[str, Any]) -> None:
        """Print a result as JSON, its schema version first."""
        # NaN is no JSON: a number that could not be measured is null
        text = json.dumps(_finite({"schema": SCHEMA, **payload}), ensure_ascii=False, indent=2, default=str)
        self.stream.write(text + "\n")
        self.stream.flush()

    def error(self, error: MemcompileError, *, exit_code: int | None = None, told: bool = False) -> int:
        """Print an error, with --json also on stdout unless that was `told`; returns the exit code."""
        click.echo(str(error), err=True)
        if self.json and not told:
            self.emit({"error": error.as_dict()})
        return error.exit_code if exit_code is None else exit_code

    def console(self) -> Console:
        """A rich console on stdout."""
        from rich.console import Console

        # a file has no width of its own
        return Console(file=self.stream, highlight=False, width=None if self.stream.isatty() else 120)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Something to report progress to, shown on stderr."""
        if self.quiet:
            yield SILENT
            return
        from memcompile.cli.progress import Lines, RichProgress

        shown: Lines | RichProgress = RichProgress() if sys.stderr.isatty() else Lines()
        try:
            yield shown
        finally:
            shown.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def pure_stdout(active: bool) -> Iterator[TextIO]:
    """Yield the real stdout; while `active`, whatever anybody else prints there goes to stderr."""
    real = sys.stdout
    if not active:
        yield real
        return
    try:
        # below Python as well: compiled libraries and child processes write to descriptor 1
        own, kept = os.dup(real.fileno()), os.dup(1)
        os.dup2(sys.stderr.fileno(), 1)
    except (OSError, AttributeError, ValueError):
        with contextlib.redirect_stdout(sys.stderr):
            yield real
        return
    try:
        with os.fdopen(own, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(sys.stderr):
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)
