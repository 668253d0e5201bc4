"""Search schedules of one kernel with MetaSchedule, building and timing candidates in this process.

MetaSchedule (Shao et al. 2022, arXiv:2205.13603) makes candidates by rules, an evolutionary search and a cost
model learnt from what was timed. Its own builder starts worker processes whose imports alone outlast their
time limit; here a candidate is compiled and timed where the search runs: one that crashes ends the search.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from memcompile.backends.tvm.place import ENTRY, Here, Place, arguments_of, export, measure
from memcompile.errors import MemcompileError
from memcompile.lowering import Progress

_PER_ROUND: Final = 16
# what MetaSchedule records for a candidate that could not be timed is longer
_FAILED_SECONDS: Final = 1e9


@dataclass(frozen=True)
class Tuned:
    """The best schedule found: `trace` as JSON text, to store and to apply again; its mean time.

    trials: candidates that were timed. default_seconds: the kernel's own time without a schedule.
    """

    trace: str
    seconds: float
    default_seconds: float
    trials: int


@dataclass
class _Search:
    """What builder and runner share: built candidates, what was timed, and when to stop."""

    place: Place
    folder: Path
    deadline: float
    trials: int
    progress: Progress
    built: dict[str, Path] = field(default_factory=dict)
    timed: int = 0
    best: float = float("inf")

    def build(self, module: Any) -> tuple[str | None, str | None]:
        if time.monotonic() > self.deadline:
            return None, "the time is up"
        try:
            module = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module)
            key = f"candidate {len(self.built)}"
            self.built[key] = export(module[ENTRY], self.place.target, self.folder / f"{len(self.built)}.so")
        except Exception as error:
            # a schedule that does not compile is a bad candidate, not a fault
            return None, str(error)
        return key, None

    def run(self, key: str, information: Any) -> tuple[list[float] | None, str | None]:
        try:
            arguments = arguments_of(information, self.place.device)
            seconds = measure(self.place.load(self.built[key]), arguments, device=self.place.device)
        except Exception as error:
            return None, str(error)
        self.timed += 1
        self.best = min(self.best, *seconds)
        self.progress(f"trial {self.timed} of {self.trials}: best {self.best * 1e3:.3f} ms")
        return seconds, None


@derived_object
class _Builder(ms.builder.PyBuilder):  # type: ignore[misc]
    """Compiles candidates in this process."""

    def __init__(self, search: _Search) -> None:
        super().__init__()
        self.search = search

    def build(self, build_inputs: list[Any]) -> list[Any]:
        return [ms.builder.BuilderResult(*self.search.build(given.mod)) for given in build_inputs]


@derived_object
class _Done(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    """A result that is there already."""

    def __init__(self, seconds: list[float] | None, error: str | None) -> None:
        super().__init__()
        self.seconds, self.error = seconds, error

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return ms.runner.RunnerResult(self.seconds, self.error)


@derived_object
class _Runner(ms.runner.PyRunner):  # type: ignore[misc]
    """Times candidates in this process, one after another."""

    def __init__(self, search: _Search) -> None:
        super().__init__()
        self.search = search

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        return [_Done(*self.search.run(given.artifact_path, given.args_info)) for given in runner_inputs]


def tune_prim_func(
    func: Any,
    place: Place | None = None,
    *,
    trials: int,
    seconds: float,
    progress: Progress,
    seed: int = 0,
) -> Tuned:
    """Search a schedule for a `tirx.PrimFunc` of blocks with fixed sizes, on one thread of this machine or on
    `place`: candidates are compiled here, and run there.

    At most `trials` candidates are timed, none after `seconds`; `progress` hears of each.
    Raises MC120 for a kernel whose sizes are not fixed, MC901 when no candidate could be timed.
    """
    place = place or Here()
    try:
        information = ms.arg_info.ArgInfo.from_prim_func(func)
    except Exception as error:
        raise MemcompileError(
            "MC120", "the kernel has sizes that are not fixed, and candidates are timed at a size",
            fix="specialise it to the sizes of the workload first",
        ) from error  # fmt: skip
    module = tvm.IRModule({ENTRY: func.with_attr("global_symbol", ENTRY)})
    with (
        tempfile.TemporaryDirectory(prefix="memcompile-search-") as folder,
        _quiet(),
        _intrinsics_of_this_cpu(),
    ):
        unscheduled = place.load(export(func, place.target, Path(folder) / "default.so"))
        default = _mean(measure(unscheduled, arguments_of(information, place.device), device=place.device))
        search = _Search(place, Path(folder), time.monotonic() + seconds, trials, progress)
        database = ms.tune_tir(
            module,
            place.target,
            folder,
            trials,
            num_trials_per_iter=min(_PER_ROUND, trials),
            builder=_Builder(search),
            runner=_Runner(search),
            database="memory",
            measure_callbacks=[ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()],
            num_tuning_cores=os.cpu_count() or 1,
            seed=seed,
        )
    records = [
        record for record in database.get_all_tuning_records() if _mean(record.run_secs) < _FAILED_SECONDS
    ]
    if not records:
        raise MemcompileError("MC901", "MetaSchedule found no candidate that could be timed")
    best = min(records, key=lambda record: _mean(record.run_secs))
    return Tuned(tvm.ir.save_json(best.trace.as_json()), _mean(best.run_secs), default, search.timed)


def scheduled(func: Any, trace: str) -> Any:
    """The kernel with a schedule found before; `trace` is that of `Tuned`, for a kernel of equal text."""
    schedule = Schedule(tvm.IRModule({ENTRY: func.with_attr("global_symbol", ENTRY)}))
    tvm.s_tir.schedule.Trace.apply_json_to_schedule(tvm.ir.load_json(trace), schedule)
    return RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)[ENTRY]


def _mean(seconds: Any) -> float:
    values = [float(s) for s in seconds]
    return sum(values) / len(values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # MetaSchedule tells of every step through `logging`, and leaves handlers that a second search trips over
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    level, handlers = logger.level, logger.handlers[:]
    logger.handlers.clear()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


@contextlib.contextmanager
def _intrinsics_of_this_cpu() -> Iterator[None]:
    """A search imports the tensor intrinsics of all targets, CUDA's for most of a minute: x86's will do."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    package = types.ModuleType(name)
    package.__path__ = [str(Path(tvm.__file__).parent / "s_tir" / "tensor_intrin")]
    sys.modules[name] = package
    try:
        importlib.import_module(f"{name}.x86")
        yield
    finally:
        del sys.modules[name]
