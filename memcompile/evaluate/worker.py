"""Measure one model in this process: `python -m memcompile.evaluate.worker ARTIFACT TASKS.json OUT`.

TASKS.json: {"opener": "module:function", "threads": n | null, "tasks": [{"key", "measure", "parameters"}]}.
OUT gets one JSON line per finished task. Progress and errors go to standard output as JSON lines.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from memcompile.errors import MemcompileError
from memcompile.evaluate.memory import peak_memory_bytes
from memcompile.evaluate.session import resolve_opener
from memcompile.evaluate.tasks import MEASURES, ResultStore

PROGRESS_SECONDS = 0.25


class _Reporter:
    """Prints progress, at most four times a second."""

    def __init__(self, measure: str) -> None:
        self._measure = measure
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= PROGRESS_SECONDS:
            self._last = now
            say({"event": "progress", "measure": self._measure, "done": done, "total": total})


def say(event: dict[str, Any]) -> None:
    """Tell the parent process something."""
    print(json.dumps(event), flush=True)


def work(model: str, request: dict[str, Any], out: Path) -> None:
    """Open the model once and run every task of the request on it."""
    store = ResultStore(out)
    begun = time.perf_counter()
    session = resolve_opener(request["opener"])(model, threads=request["threads"])
    opened = {"load_seconds": time.perf_counter() - begun, "load_memory_bytes": peak_memory_bytes()}
    for task in request["tasks"]:
        result = MEASURES[task["measure"]](session, task["parameters"], _Reporter(task["measure"]))
        store.append(task["key"], task["measure"], {**opened, **result})


def main(arguments: list[str]) -> int:
    """Run the worker; a MemcompileError is handed to the parent as it is."""
    model, tasks, out = arguments
    try:
        work(model, json.loads(Path(tasks).read_text(encoding="utf-8")), Path(out))
    except MemcompileError as problem:
        say({"event": "error", **problem.as_dict()})
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
