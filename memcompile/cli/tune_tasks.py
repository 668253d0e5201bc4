"""The tasks of a subject: attention on its backend, and with TVM's engine its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from memcompile.errors import MemcompileError

if TYPE_CHECKING:
    from memcompile.cli.tune_subject import Subject
    from memcompile.tuning import Task

# of the time of a linear layer, what MetaSchedule may take
SEARCH_SHARE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Engine:
    """How to tune: the type of attention, seconds for everything, trials of MetaSchedule, another machine."""

    dtype: str
    seconds: float
    trials: int
    rpc: str | None = None


def tasks_of(subject: Subject, engine: Engine) -> list[Task]:
    """Prefill and decode of every region, then of every linear layer.

    Raises MC120 when another machine is asked for that is not reached, or a backend that only runs here.
    """
    from memcompile.tuning import make_task, problems, products

    if engine.rpc is not None and subject.backend != "tvm":
        raise MemcompileError(
            "MC120", f"backend {subject.backend} is timed on this machine only", where="--rpc",
            fix="add --engine tvm, or run memcompile tune on that machine",
        )  # fmt: skip
    workload = subject.workload
    found: list[Any] = [
        problem for ask in subject.asks for problem in problems(ask.shape, workload, ask.held_tokens)
    ]
    for width, features, whole in subject.products:
        prefill, decode = products(width, features, workload.prompt_tokens, workload.batch)
        found += [prefill, decode] if whole else [decode]
    given: dict[str, Any] = {}
    if subject.backend == "tvm":
        seconds = engine.seconds * SEARCH_SHARE / len(found)
        given = {"rpc": engine.rpc, "trials": engine.trials, "search_seconds": seconds}
    return [
        make_task(subject.backend, problem, threads=workload.threads, dtype=engine.dtype, **given)
        for problem in found
    ]
