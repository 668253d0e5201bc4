"""Tune tasks one after the other within a time, and remember each as soon as it is done."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from memcompile.errors import MemcompileError
from memcompile.progress import SILENT, Progress
from memcompile.tuning.database import Database
from memcompile.tuning.machine import fingerprint, versions
from memcompile.tuning.records import Key, Record
from memcompile.tuning.search import Search, Settings
from memcompile.tuning.space import Candidate, Space
from memcompile.tuning.timing import Clock, Run

# backend -> "module:function" that makes a task of a problem, a number of threads and a type
TASKS: Final[dict[str, str]] = {
    "onnxruntime": "memcompile.backends.onnxruntime.timed:attention_task",
    "torch": "memcompile.backends.torch.timed:attention_task",
    "tvm": "memcompile.backends.tvm.timed:task_of",
}


class Opened(Protocol):
    """A candidate that is ready to run."""

    def run(self) -> float | None:
        """Do the work once; gives its seconds where another machine did it."""

    def output(self) -> NDArray[Any]:
        """What the work gives, in the same order for every candidate."""


class Tunable(Protocol):
    """What a task is about: `Problem` (attention) or `Product` (a linear layer)."""

    operator: str

    @property
    def sizes(self) -> dict[str, int]:
        """What the time depends on."""

    def repeats(self, candidate: Candidate) -> int:
        """Calls of one run."""

    def runs(self, candidate: Candidate) -> float:
        """Runs that the whole work takes."""


class Task(Protocol):
    """What is tuned: a problem on one backend.

    `tolerance`: how far an output may be from the default's, relative to the default's largest value.
    `device`: what tells the machine that runs it from others; None: this one.
    """

    backend: str
    problem: Any
    dtype: str
    threads: int
    space: Space
    packages: tuple[str, ...]
    tolerance: float
    device: Mapping[str, str | int] | None

    def open(self, candidate: Candidate) -> Opened:
        """Make a candidate ready. Raises ValueError when it cannot run, with the reason."""


@dataclass(frozen=True)
class Outcome:
    """What became of the tasks: new records, known ones, and those that no time was left for."""

    records: list[Record] = field(default_factory=list)
    known: list[Record] = field(default_factory=list)
    left: list[Tunable] = field(default_factory=list)


def make_task(backend: str, problem: Tunable, *, threads: int, dtype: str, **engine: Any) -> Task:
    """The task of a backend; `engine` has what it alone understands. Raises MC112 for a backend without."""
    if backend not in TASKS:
        raise MemcompileError(
            "MC112", f"backend {backend!r} has nothing to tune", fix=f"use one of {', '.join(TASKS)}"
        )
    module, _, attribute = TASKS[backend].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)(
        problem, threads=threads, dtype=dtype, **engine
    )  # fmt: skip
    return task


def key_of(task: Task) -> Key:
    """Where a task's record stands in the database."""
    problem = task.problem
    device = task.device or fingerprint(task.threads)
    return Key(task.backend, problem.operator, problem.sizes, task.dtype, device, versions(task.packages))


def tune(
    tasks: Sequence[Task],
    database: Database,
    *,
    seconds: float,
    again: bool = False,
    settings: Settings | None = None,
    progress: Progress = SILENT,
    clock: Clock = time.perf_counter,
) -> Outcome:
    """Search each task's space, unless the database knows it; `again` searches all the same.

    What is left of `seconds` is shared evenly by the tasks that are left; a search that has begun ends with
    a result, so the last may overrun by its first rounds. Raises MC122 and MC123.
    """
    outcome = Outcome()
    waiting: list[tuple[Task, Key]] = []
    for task in tasks:
        key = key_of(task)
        record = None if again else database.find(key)
        if record is None:
            waiting.append((task, key))
        else:
            outcome.known.append(record)
    # the kernels may have been built just now: that is no time of the search
    deadline = clock() + seconds
    for index, (task, key) in enumerate(waiting):
        left = deadline - clock()
        if index and left <= 0:
            outcome.left.append(task.problem)
            continue
        progress.stage(f"tune {task.backend} {task.problem}")
        share = replace(settings or Settings(), seconds=max(left, 0.0) / (len(waiting) - index))
        record = _search(task, key, share, progress.update, clock)
        database.store(record)
        outcome.records.append(record)
    return outcome


def _search(
    task: Task, key: Key, settings: Settings, update: Callable[[int, int], None], clock: Clock
) -> Record:
    prepare = Twin(task).prepare
    search = Search(task.space, key.sizes, prepare, settings, task.problem.runs, clock, update)
    try:
        found = search.run()
    except ValueError as error:
        raise MemcompileError(
            "MC123",
            f"the default of {task.problem.operator} cannot run on {task.backend}: {error}",
            where=str(task.problem),
            fix="choose sizes that the kernels take (they need a C++ compiler), or another backend",
        ) from error
    return Record.of(key, task.space.default, found, datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass
class Twin:
    """Opens candidates, and lets none run whose output is not the default's."""

    task: Task
    expected: NDArray[Any] | None = None

    def prepare(self, candidate: Candidate) -> Run | str:
        """The candidate's run, or why it is refused. The default has to come first."""
        try:
            opened = self.task.open(candidate)
            opened.run()
            got = opened.output()
        except (ValueError, MemoryError) as error:
            return str(error) or type(error).__name__
        if self.expected is None:
            if not np.isfinite(got).all():
                return "its output is not finite"
            self.expected = got
            return self._repeated(candidate, opened.run)
        if got.shape != self.expected.shape:
            return f"its output is {got.shape}, the default's {self.expected.shape}"
        error_ = float(np.abs(got - self.expected).max() / max(float(np.abs(self.expected).max()), 1e-30))
        # NaN is not below any tolerance
        if not error_ <= self.task.tolerance:
            return (
                f"its output differs from the default's by {error_:.1e}, {self.task.tolerance:.0e} is allowed"
            )
        return self._repeated(candidate, opened.run)

    def _repeated(self, candidate: Candidate, run: Run) -> Run:
        times = self.task.problem.repeats(candidate)

        def repeated() -> float | None:
            told = [run() for _ in range(times)]
            return sum(seconds for seconds in told if seconds is not None) if told[0] is not None else None

        return repeated
