"""What was tuned for torch is what a session runs on, and it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchBackend, TorchSession
from memcompile.backends.torch.timed import PACKAGES
from memcompile.program import Program, build_program
from memcompile.regions import argument, attention_nodes
from memcompile.rewrite.manager import apply
from memcompile.tuning import (
    KERNELS,
    Candidate,
    Choice,
    Choices,
    Database,
    Key,
    Record,
    Shape,
    Workload,
    make_task,
    problems,
)
from memcompile.tuning.machine import fingerprint, versions
from memcompile.tuning.timing import Gain
from tests.models import captured_tiny
from tests.rewrite.tiny import calibration, entry

WORKLOAD = Workload(prompt_tokens=70, new_tokens=8, threads=64)


def know(database: Database, shape: Shape, prefill: Candidate, decode: Candidate) -> None:
    """Store that these candidates are twice as fast as the default."""
    threads = torch.get_num_threads()
    for problem, best in zip(problems(shape, WORKLOAD), (prefill, decode), strict=True):
        task = make_task("torch", problem, threads=threads, dtype="float32")
        key = Key(
            "torch", problem.operator, problem.sizes, "float32", fingerprint(threads), versions(PACKAGES)
        )
        seconds = {task.space.default: (1.0,), best: (0.5,)}
        shares = {task.space.default: 1.0, best: 0.5}
        database.store(
            Record(key, task.space.default, best, Gain(2, 2, 2, 2), seconds, shares, {}, 2, True, "now")
        )


def program_of(folder: Path, *entries: Any) -> Program:
    captured = captured_tiny("llama")
    apply(captured.graph, list(entries), calibration=calibration(folder))
    return build_program(captured)


def logits(session: TorchSession) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 64, length).tolist() for length in (70, 40)]
    state = session.new_state(2)
    found = [*session.prefill(state, rows)]
    found += [session.decode(state, np.array([5, 6])) for _ in range(2)]
    single = session.new_state(1)
    found += [*session.prefill(single, rows[:1]), session.decode(single, np.array([7]))]
    found.append(session.extend(single, [3, 4, 5]))
    return np.concatenate(found)


@pytest.mark.parametrize(
    "choice", [Choice("sdpa"), Choice(KERNELS, key_tile=16, splits=4)], ids=["sdpa", "parameters"]
)
@pytest.mark.parametrize("bits", [0, 8])
def test_every_choice_computes_the_same(choice: Choice, bits: int, tmp_path: Path) -> None:
    entries = [entry("kv.quantize", bits=bits)] if bits else []
    program = program_of(tmp_path, *entries)
    chosen = Choices(0, {state.region: choice for state in program.states})
    session = TorchSession(program, choices=chosen)
    np.testing.assert_allclose(logits(session), logits(TorchSession(program)), atol=2e-5, rtol=0)


def test_a_session_runs_on_what_was_tuned(tmp_path: Path) -> None:
    database = Database.at(tmp_path / "tuning.json")
    program = program_of(tmp_path)
    know(database, Shape(4, 2, 16), Candidate("sdpa"), Candidate("sdpa"))
    session = TorchBackend(database=database).tuned_for(WORKLOAD).session(program)
    assert [d["decision"] for d in session.decisions] == [
        "sdpa, 2.00x as fast as the default over the workload"
    ]
    assert [argument(node, "kernel") for node in attention_nodes(session._step)] == ["sdpa"] * 2
    # the program is as it was
    assert program.step is not None
    assert [argument(node, "kernel") for node in attention_nodes(program.step)] == [""] * 2


def test_regions_that_choose_their_keys_keep_the_kernels(tmp_path: Path) -> None:
    database = Database.at(tmp_path / "tuning.json")
    know(database, Shape(4, 2, 16), Candidate("sdpa"), Candidate("sdpa"))
    program = program_of(
        tmp_path,
        entry("attention.sparse", selector="pages", layers=0),
        entry("attention.sparse", selector="shape", layers=1),
    )
    session = TorchBackend(database=database).tuned_for(WORKLOAD).session(program)
    assert session.decisions == ()


def test_without_records_nothing_changes(tmp_path: Path) -> None:
    program = program_of(tmp_path)
    session = TorchBackend(database=Database.at(tmp_path / "none.json")).tuned_for(WORKLOAD).session(program)
    assert session.decisions == ()
    assert session._step is program.step
