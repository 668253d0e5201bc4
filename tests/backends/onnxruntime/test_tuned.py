"""Candidates agree, and what was tuned is what an artifact runs on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from memcompile import pipeline
from memcompile.backends.onnxruntime.backend import KERNEL_MODEL, OnnxRuntimeBackend
from memcompile.backends.onnxruntime.timed import PACKAGES
from memcompile.errors import MemcompileError
from memcompile.lowering import Lowered
from memcompile.plan import load_plan
from memcompile.program import build_program
from memcompile.progress import SILENT
from memcompile.tuning import (
    KERNELS,
    Candidate,
    Database,
    Key,
    Problem,
    Record,
    Settings,
    Shape,
    Workload,
    make_task,
    problems,
    tune,
)
from memcompile.tuning.machine import fingerprint, versions
from memcompile.tuning.timing import Gain
from tests.models import captured_tiny

WORKLOAD = Workload(prompt_tokens=70, new_tokens=8, threads=1)
SHAPES = {
    "grouped": Shape(4, 2, 16),
    "of uneven width": Shape(3, 3, 12),
    "int8": Shape(4, 2, 32, bits=8),
    "int4": Shape(4, 1, 32, bits=4),
    "window and sinks": Shape(4, 2, 16, window=9, sinks=3),
    "int8, strided": Shape(4, 2, 16, bits=8, window=9, sinks=1, block=8, stride=3),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_candidate_gives_what_the_default_gives(name: str, backend: str) -> None:
    for problem in problems(SHAPES[name], dataclasses.replace(WORKLOAD, prompt_tokens=600, batch=2)):
        task = make_task(backend, problem, threads=1, dtype="float32")
        outputs = []
        for candidate in task.space.candidates(problem.sizes):
            opened = task.open(candidate)
            opened.run()
            outputs.append(opened.output())
        assert len(outputs) > 2
        assert np.abs(outputs[0]).max() > 0.05
        for output in outputs[1:]:
            assert output.shape == outputs[0].shape
            assert np.abs(output - outputs[0]).max() <= task.tolerance * np.abs(outputs[0]).max()


def test_a_type_that_a_backend_does_not_compute_in_is_refused() -> None:
    with pytest.raises(MemcompileError, match="MC123 onnxruntime has no attention in float16 on the CPU"):
        make_task("onnxruntime", problems(SHAPES["int8"], WORKLOAD)[0], threads=1, dtype="float16")
    with pytest.raises(
        MemcompileError, match="MC123 torch's attention is tuned in float32, bfloat16, float16"
    ):
        make_task("torch", problems(SHAPES["int8"], WORKLOAD)[0], threads=1, dtype="float64")


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database.at(tmp_path / "tuning.json")


def test_a_real_tuning_is_found_by_the_backend(database: Database, tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    state = build_program(captured).states[0]
    shape = Shape(state.heads, state.kv_heads, -(-state.head_dim // 8) * 8)
    tasks = [make_task("onnxruntime", p, threads=1, dtype="float32") for p in problems(shape, WORKLOAD)]
    outcome = tune(tasks, database, seconds=100, settings=Settings(rounds=1))
    assert [r.key.operator for r in outcome.records] == ["attention.prefill", "attention.decode"]
    for record in outcome.records:
        assert record.refused == {}
        assert all(s > 0 for times in record.seconds.values() for s in times)
        # what was timed beside the default is of the runtime as well
        assert {c.implementation for c in record.seconds} == {"kernels", "runtime"}
    lowered = lower(captured, database, tmp_path)
    (decision,) = (d for d in lowered.decisions if d["tuned"] == "attention")
    assert decision["regions"].split(", ") == [s.region for s in build_program(captured).states]


def lower(captured: Any, database: Database, folder: Path, workload: Workload = WORKLOAD) -> Lowered:
    backend = OnnxRuntimeBackend(database=database).tuned_for(workload)
    out = folder / "out"
    out.mkdir()
    return backend.lower(build_program(captured), out, device="cpu", progress=SILENT.stage)


def know(database: Database, captured: Any, prefill: Candidate, decode: Candidate) -> None:
    """Store that these candidates are twice as fast as the default."""
    state = build_program(captured).states[0]
    shape = Shape(state.heads, state.kv_heads, -(-state.head_dim // 8) * 8)
    for problem, best in zip(problems(shape, WORKLOAD), (prefill, decode), strict=True):
        task = make_task("onnxruntime", problem, threads=1, dtype="float32")
        device = fingerprint(1)
        key = Key("onnxruntime", problem.operator, problem.sizes, "float32", device, versions(PACKAGES))
        seconds = {task.space.default: (1.0,), best: (0.5,)}
        shares = {task.space.default: 1.0, best: 0.5}
        database.store(
            Record(key, task.space.default, best, Gain(2, 2, 2, 2), seconds, shares, {}, 2, True, "now")
        )


def test_parameters_reach_the_operators_of_the_artifact(database: Database, tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    tile, splits = (("key_tile", 32), ("chunk", 512)), (("splits", 4),)
    know(database, captured, Candidate(KERNELS, tile), Candidate(KERNELS, splits))
    lowered = lower(captured, database, tmp_path)
    nodes = [n for n in ir.load(tmp_path / "out" / KERNEL_MODEL).graph if n.domain == "memcompile"]
    assert len(nodes) == len(build_program(captured).states)
    assert {(n.attributes.get_int("key_tile"), n.attributes.get_int("splits")) for n in nodes} == {(32, 4)}
    assert lowered.decisions[0]["decision"].startswith("kernels key_tile=32 splits=4, 2.00x")


def test_where_the_runtime_is_faster_its_operator_stays(database: Database, tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    know(database, captured, Candidate("runtime", (("chunk", 256),)), Candidate("runtime"))
    lowered = lower(captured, database, tmp_path)
    assert (lowered.functions["step"].kernel_file, lowered.functions["step"].kernels) == (None, ())
    assert not (tmp_path / "out" / KERNEL_MODEL).exists()
    assert lowered.prefill.chunk_tokens == 256
    assert [d["decision"] for d in lowered.decisions] == [
        "runtime, 2.00x as fast as the default over the workload",
        "chunks of 256 tokens in place of 512",
    ]


@pytest.mark.parametrize(
    "workload", [dataclasses.replace(WORKLOAD, prompt_tokens=7000), None], ids=["another length", "none"]
)
def test_what_was_not_tuned_runs_on_our_kernels(
    workload: Workload | None, database: Database, tmp_path: Path
) -> None:
    captured = captured_tiny("llama")
    know(database, captured, Candidate("runtime", (("chunk", 512),)), Candidate("runtime"))
    backend = OnnxRuntimeBackend(workload, database)
    lowered = backend.lower(build_program(captured), tmp_path, device="cpu", progress=SILENT.stage)
    assert lowered.functions["step"].kernels == ("Attention",)
    assert lowered.decisions == ()


def test_problems_are_told_apart_by_their_sizes() -> None:
    prefill, decode = problems(SHAPES["int8"], dataclasses.replace(WORKLOAD, batch=2), held_tokens=20)
    assert (prefill.tokens, prefill.batch, decode.tokens, decode.batch) == (70, 1, 20, 2)
    assert Problem.from_sizes(decode.operator, decode.sizes) == decode


def test_optimize_asks_the_users_database_at_the_plans_workload(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("memcompile.tuning.database.default_database", lambda: database.path)
    captured = captured_tiny("llama")
    tile, splits = (("key_tile", 0), ("chunk", 256)), (("splits", 4),)
    know(database, captured, Candidate(KERNELS, tile), Candidate(KERNELS, splits))
    workload = {"prompt_tokens": WORKLOAD.prompt_tokens, "new_tokens": WORKLOAD.new_tokens}
    plan = load_plan({"workload": workload, "target": {"threads": 1}})
    manifest = pipeline.optimize(captured, plan, tmp_path / "artifact", evaluate=False).manifest
    assert manifest.prefill.chunk_tokens == 256
    assert manifest.functions["step"].kernels == ("Attention",)
    assert [d["tuned"] for d in manifest.decisions] == ["attention", "prefill"]
