"""The command line. Commands are loaded when they are called: `memcompile --help` imports no torch."""

from __future__ import annotations

from memcompile.cli.main import main

__all__ = ["main"]
