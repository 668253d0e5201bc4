"""Every error a user can meet: a code, what is wrong, where, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

INTERNAL, USAGE, MODEL, COVERAGE, GATE, ARTIFACT = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What a code means, and the exit code of a command that ends with it."""

    title: str
    exit_code: int


ERRORS: Final[dict[str, ErrorKind]] = {
    "MC101": ErrorKind("the plan is not well-formed YAML", USAGE),
    "MC102": ErrorKind("unknown key in the plan", USAGE),
    "MC103": ErrorKind("a value in the plan has the wrong type", USAGE),
    "MC104": ErrorKind("a value in the plan is out of range", USAGE),
    "MC105": ErrorKind("unknown pass", USAGE),
    "MC106": ErrorKind("unknown preset", USAGE),
    "MC107": ErrorKind("a required key is missing from the plan", USAGE),
    "MC108": ErrorKind("a --set override cannot be applied", USAGE),
    "MC109": ErrorKind("two passes of the plan contradict each other", USAGE),
    "MC110": ErrorKind("the plan file cannot be read", USAGE),
    "MC111": ErrorKind("the plan has a version this memcompile does not know", USAGE),
    "MC112": ErrorKind("unknown backend or device", USAGE),
    "MC113": ErrorKind("unknown gate, or a gate without a limit", USAGE),
    "MC114": ErrorKind("imported plan fragments cannot be resolved", USAGE),
    "MC115": ErrorKind("a package or tool that the backend needs is not installed", USAGE),
    "MC116": ErrorKind("the target cannot run what the plan asks for", USAGE),
    "MC120": ErrorKind("an argument of the command is not usable", USAGE),
    "MC121": ErrorKind("a text is missing or too short", USAGE),
    "MC122": ErrorKind("the tuning database cannot be used", USAGE),
    "MC123": ErrorKind("there is nothing to tune at these sizes", USAGE),
    "MC130": ErrorKind("the prompt is longer than the model's positions", USAGE),
    "MC131": ErrorKind("the prompt is empty", USAGE),
    "MC201": ErrorKind("the model source does not exist", MODEL),
    "MC202": ErrorKind("the model source is not a model", MODEL),
    "MC203": ErrorKind("the architecture was not understood", MODEL),
    "MC204": ErrorKind("the model could not be captured", MODEL),
    "MC205": ErrorKind("the example inputs do not fit the model", MODEL),
    "MC206": ErrorKind("a package needed for this model source is not installed", MODEL),
    "MC301": ErrorKind("a selector matched nothing", COVERAGE),
    "MC302": ErrorKind("a pass matched fewer regions than the plan expects", COVERAGE),
    "MC303": ErrorKind("a pass was refused everywhere", COVERAGE),
    "MC305": ErrorKind("a pass would change nothing at this workload", COVERAGE),
    "MC401": ErrorKind("a gate is not met", GATE),
    "MC402": ErrorKind("a process that measures a model failed", INTERNAL),
    "MC501": ErrorKind("there is no artifact here", ARTIFACT),
    "MC502": ErrorKind("the artifact was written by a newer memcompile", ARTIFACT),
    "MC503": ErrorKind("a file of the artifact does not have its recorded digest", ARTIFACT),
    "MC504": ErrorKind("the manifest names a path outside the artifact", ARTIFACT),
    "MC505": ErrorKind("the manifest is not valid", ARTIFACT),
    "MC506": ErrorKind("a file of the artifact is missing or truncated", ARTIFACT),
    "MC508": ErrorKind("the output path is taken", USAGE),
    "MC509": ErrorKind("the artifact could not be written", ARTIFACT),
    "MC510": ErrorKind("a package needed to run the artifact is not installed", ARTIFACT),
    "MC511": ErrorKind("the device the artifact asks for is not available", ARTIFACT),
    "MC901": ErrorKind("memcompile broke one of its own rules", INTERNAL),
}


class MemcompileError(Exception):
    """Something the user can mend: code, what (both values), where, fix."""

    def __init__(self, code: str, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.code = code
        self.message = message
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    @property
    def exit_code(self) -> int:
        return ERRORS[self.code].exit_code

    def __str__(self) -> str:
        lines = [f"{self.code} {self.message}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | int | None]:
        """The error as `--json` prints it."""
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "fix": self.fix,
            "exit_code": self.exit_code,
        }
