"""A task is one measurement of one model; what decides its result names it, so that none is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from memcompile.evaluate.cost import Update, measure_cost
from memcompile.evaluate.forward import measure_forward
from memcompile.evaluate.passkey import measure_passkey
from memcompile.evaluate.perplexity import measure_perplexity

PROTOCOL_VERSION: Final = 1
"""Raised when a change of the protocol makes older results incomparable."""

Measure = Callable[[Any, dict[str, Any], Update], dict[str, Any]]
MEASURES: Final[dict[str, Measure]] = {
    "cost": measure_cost,
    "perplexity": measure_perplexity,
    "passkey": measure_passkey,
    "forward": measure_forward,
}


@dataclass(frozen=True, slots=True)
class Task:
    """`measure` names the function; `parameters` decide the result; `files` say only where things lie."""

    measure: str
    parameters: dict[str, Any]
    files: dict[str, str | None] = field(default_factory=dict)

    def key(self, subject: str) -> str:
        """Return what identifies the result for a model with digest `subject`."""
        identity = json.dumps([PROTOCOL_VERSION, subject, self.measure, self.parameters], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:24]

    def as_dict(self, subject: str) -> dict[str, Any]:
        """The task as a worker reads it."""
        parameters = {**self.parameters, **self.files}
        return {"key": self.key(subject), "measure": self.measure, "parameters": parameters}

    def file_is_there(self) -> bool:
        """Whether the file that this task leaves for another model, if it leaves one, still exists."""
        saved = self.files.get("save_to")
        return saved is None or Path(saved).exists()


class ResultStore:
    """Results as JSON lines, appended by workers as each task ends; a torn last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Return every finished result by key."""
        found: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return found
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, key: str, measure: str, result: dict[str, Any]) -> None:
        """Add one result; starts a new line, so a torn one before it spoils nothing."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"key": key, "measure": measure, "result": result}) + "\n")
