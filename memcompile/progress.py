"""How long work tells whoever is waiting what it is doing. Drawing it is left to the command line."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about stages, and about steps within the current stage."""

    def stage(self, name: str) -> None:
        """Begin a stage, and with it end the one before: "capture", "calibrate", "write weights"."""

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps of the current stage are finished."""


class Silent:
    """The progress of somebody who is not watching."""

    def stage(self, name: str) -> None:
        del name

    def update(self, done: int, total: int) -> None:
        del done, total


SILENT: Progress = Silent()
