"""Tuning goes on where it stopped, and times nothing that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memcompile.errors import MemcompileError
from memcompile.tuning import Candidate, Database, Parameter, Problem, Shape, Space, make_task, tune
from tests.tuning.machines import TWO, Machine, distance_to

SHAPE = Shape(4, 2, 16)
WRONG = Candidate("theirs")
Answer = Callable[[Candidate], NDArray[Any]]


def right(candidate: Candidate) -> NDArray[Any]:
    del candidate
    return np.array([1.0, 2.0])


@dataclass
class Toy:
    """A task on a toy machine."""

    machine: Machine
    problem: Problem = field(default_factory=lambda: Problem("attention.decode", SHAPE, 64))
    answer: Answer = right
    backend: str = "onnxruntime"
    dtype: str = "float32"
    threads: int = 1
    space: Space = TWO
    packages: tuple[str, ...] = ("numpy",)
    tolerance: float = 1e-3
    device: None = None

    def open(self, candidate: Candidate) -> Any:
        return Ready(self.machine.runner(candidate), self.answer(candidate))


@dataclass
class Ready:
    run: Callable[[], None]
    value: NDArray[Any]

    def output(self) -> NDArray[Any]:
        return self.value


@pytest.fixture
def machine() -> Machine:
    return Machine(distance_to(tile=1))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database.at(tmp_path / "tuning.json")


def test_what_is_known_is_not_measured_again_unless_asked(machine: Machine, database: Database) -> None:
    first = tune([Toy(machine)], database, seconds=100, clock=machine.clock)
    calls = len(machine.calls)
    assert [r.winner.get("tile") for r in first.records] == [1]
    second = tune([Toy(machine)], database, seconds=100, clock=machine.clock)
    assert second.records == []
    assert [(r.key, r.winner, r.when) for r in second.known] == [
        (r.key, r.winner, r.when) for r in first.records
    ]
    assert len(machine.calls) == calls
    third = tune([Toy(machine)], database, seconds=100, again=True, clock=machine.clock)
    assert len(third.records) == 1
    assert len(machine.calls) > calls
    assert len(database.records()) == 1


def test_what_no_time_was_left_for_is_tuned_by_the_next_call(machine: Machine, database: Database) -> None:
    tasks = [Toy(machine, Problem("attention.decode", SHAPE, tokens)) for tokens in (64, 128)]
    first = tune(tasks, database, seconds=0.1, clock=machine.clock)
    assert ([r.key.sizes["tokens"] for r in first.records], first.left) == ([64], [tasks[1].problem])
    second = tune(tasks, database, seconds=0.1, clock=machine.clock)
    assert [r.key.sizes["tokens"] for r in second.records] == [128]
    assert [r.key.sizes["tokens"] for r in second.known] == [64]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (np.array([1.0, 2.1]), "its output differs from the default's by 5.0e-02, 1e-03 is allowed"),
        (np.array([1.0, np.nan]), "its output differs from the default's by nan"),
        (np.array([1.0]), r"its output is \(1,\), the default's \(2,\)"),
    ],
)
def test_a_wrong_candidate_is_refused_though_it_is_fast(
    wrong: NDArray[Any], reason: str, database: Database
) -> None:
    machine = Machine(lambda c: 0.001 if c == WRONG else 0.1)
    toy = Toy(machine, answer=lambda c: wrong if c == WRONG else right(c))
    (record,) = tune([toy], database, seconds=100, clock=machine.clock).records
    assert record.winner != WRONG
    assert WRONG not in record.seconds
    (said,) = (r for c, r in record.refused.items() if c == WRONG)
    assert re.match(reason, said)
    # its output was looked at once, and never again
    assert machine.calls.count(WRONG) == 1


def test_a_default_that_is_not_finite_is_an_error(machine: Machine, database: Database) -> None:
    toy = Toy(machine, answer=lambda c: np.array([np.inf]))
    with pytest.raises(MemcompileError, match=r"MC123 the default of attention\.decode cannot run") as caught:
        tune([toy], database, seconds=100, clock=machine.clock)
    assert caught.value.where == "decode 64: 4/2 heads of 16"
    assert database.records() == {}


def test_a_backend_without_choices_is_an_error() -> None:
    with pytest.raises(MemcompileError, match="MC112 backend 'tvn' has nothing to tune"):
        make_task("tvn", Problem("attention.decode", SHAPE, 64), threads=1, dtype="float32")


@pytest.mark.parametrize(
    ("tokens", "chunk", "repeats"), [(2048, 256, 4), (2048, 1024, 1), (600, 256, 2), (70, 512, 1)]
)
def test_a_run_does_the_same_work_whatever_the_chunk(tokens: int, chunk: int, repeats: int) -> None:
    problem = Problem("attention.prefill", SHAPE, tokens)
    candidate = Candidate("ours", (("chunk", chunk),))
    assert problem.repeats(candidate) == repeats
    assert problem.runs(candidate) * repeats * min(chunk, tokens) == tokens


def test_a_candidate_is_run_as_often_as_the_work_takes(database: Database) -> None:
    machine = Machine(lambda c: 0.02)
    space = Space("attention.prefill", {"ours": (Parameter("chunk", (256, 1024), 1024),)})
    toy = Toy(machine, Problem("attention.prefill", SHAPE, 2048), space=space)
    (record,) = tune([toy], database, seconds=100, clock=machine.clock).records
    # a call of either takes as long, and the small chunk needs four times as many
    assert record.winner == space.default
    small = Candidate("ours", (("chunk", 256),))
    assert record.shares[small] == pytest.approx(4.0)
    assert record.seconds[small] == pytest.approx([0.16] * len(record.seconds[small]))
