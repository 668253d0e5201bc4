"""Start workers: each model is measured in a fresh process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import memcompile
from memcompile.errors import MemcompileError
from memcompile.evaluate.tasks import ResultStore, Task

_DECIDING: Final = (
    "backend", "device", "threads", "model", "functions", "states", "groups", "prefill", "tokenizer"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under measurement: what to open, how, and a digest that changes with it."""

    role: str
    model: str
    opener: str
    digest: str


def artifact_digest(artifact: Path) -> str:
    """Return a digest of everything in the artifact that decides its results.

    It covers functions, states, groups and file digests of the manifest, and not the reports added later.
    """
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    files = {
        name: facts.get("sha256") if isinstance(facts, dict) else facts
        for name, facts in manifest.get("files", {}).items()
        if not name.startswith("report.")
    }
    identity = json.dumps([{key: manifest.get(key) for key in _DECIDING}, files], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def run_tasks(
    subject: Subject,
    tasks: Sequence[Task],
    store: ResultStore,
    *,
    threads: int | None,
    update: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Run the tasks that the store has no result for, in one fresh process; return all results in order.

    Raises the worker's own MemcompileError, or MC402 when the process ends in another way.
    """
    identity = f"{subject.role} {subject.digest}"
    keys = [task.key(identity) for task in tasks]
    done = store.read()
    missing = [
        task for task, key in zip(tasks, keys, strict=True) if key not in done or not task.file_is_there()
    ]
    if missing:
        request = {
            "opener": subject.opener,
            "threads": threads,
            "tasks": [task.as_dict(identity) for task in missing],
        }
        _run_worker(subject, request, store, update)
        done = store.read()
    return [done[key] for key in keys]


def _run_worker(
    subject: Subject,
    request: dict[str, Any],
    store: ResultStore,
    update: Callable[[str, int, int], None],
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="memcompile-evaluate-") as folder,
        tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as errors,
    ):
        tasks_file = Path(folder) / "tasks.json"
        tasks_file.write_text(json.dumps(request), encoding="utf-8")
        worker = [sys.executable, "-m", "memcompile.evaluate.worker"]
        command = [*worker, subject.model, str(tasks_file), str(store.path)]
        problem: MemcompileError | None = None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", env=_environment()
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    problem = _hear(line, update) or problem
            except BaseException:
                process.kill()
                raise
        if problem is not None:
            raise problem
        if process.returncode != 0:
            errors.seek(0)
            raise _failure(subject, process.returncode, errors.read())


def _environment() -> dict[str, str]:
    """This process's environment, with memcompile importable where it is not installed."""
    root = str(Path(memcompile.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}


def _hear(line: str, update: Callable[[str, int, int], None]) -> MemcompileError | None:
    """Pass one line of a worker's output on; anything that is not an event is the runtime's own chatter."""
    try:
        event = json.loads(line)
        kind = event["event"]
    except (ValueError, KeyError, TypeError):
        return None
    if kind == "progress":
        update(event["measure"], int(event["done"]), int(event["total"]))
    if kind == "error":
        return MemcompileError(event["code"], event["message"], where=event["where"], fix=event["fix"])
    return None


def _failure(subject: Subject, returncode: int, errors: str) -> MemcompileError:
    lines = [line for line in errors.splitlines() if line.strip()]
    if returncode < 0:
        reason = f"was ended by signal {-returncode}"
        fix = "signal 9 is most often the system running out of memory: lower workload.prompt_tokens or batch"
    else:
        reason = f"ended with code {returncode}: {lines[-1] if lines else 'no message'}"
        fix = "run it by hand with `python -m memcompile.evaluate.worker` for the whole traceback"
    message = f"the process measuring the {subject.role.replace('_', ' ')} model {reason}"
    return MemcompileError("MC402", message, where=subject.model, fix=fix)
