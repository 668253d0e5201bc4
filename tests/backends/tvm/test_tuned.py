"""The tvm backend in the tuner: candidates compute the same, elsewhere too, and lowering uses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memcompile.backends.tvm.backend import TvmBackend
from memcompile.backends.tvm.interface import step_interface
from memcompile.backends.tvm.kernels import AttentionSizes, AttentionTiles
from memcompile.backends.tvm.timed import METASCHEDULE, SCRIPT, TILES, Call
from memcompile.backends.tvm.tuned import Kernels, Tuned
from memcompile.cli import main
from memcompile.errors import MemcompileError
from memcompile.program import build_program
from memcompile.tuning import (
    DECODE,
    KERNELS,
    Candidate,
    Choice,
    Database,
    Problem,
    Record,
    Shape,
    Task,
    Workload,
    make_task,
    problems,
    products,
)
from memcompile.tuning.search import Found
from memcompile.tuning.timing import Gain
from memcompile.tuning.tuner import Twin, key_of
from tests.models import captured_tiny

SHAPE = Shape(4, 2, 16)
WORKLOAD = Workload(64, 8)
SCRIPTED = Candidate(SCRIPT, tuple((p.name, p.choices[0]) for p in TILES))


def task(problem: Problem, **engine: object) -> Task:
    return make_task("tvm", problem, threads=1, dtype="float32", **engine)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_kernels_of_a_region_compute_the_same(bits: int) -> None:
    for problem in problems(replace(SHAPE, bits=bits), WORKLOAD):
        twin = Twin(task(problem))
        assert callable(twin.prepare(twin.task.space.default))
        chunk = () if problem.operator == DECODE else (("chunk", 512),)
        assert callable(twin.prepare(replace(SCRIPTED, parameters=(*SCRIPTED.parameters, *chunk))))


def test_metaschedule_is_a_candidate_of_linear_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path))
    prefill, decode = products(32, 24, 16)
    twin = Twin(task(prefill, trials=2, search_seconds=60))
    assert callable(twin.prepare(twin.task.space.default))
    assert callable(twin.prepare(Candidate(METASCHEDULE)))
    (stored,) = (tmp_path / "schedules").iterdir()
    before = stored.read_bytes()
    # the second time it is not searched: one trial would have to be timed, none is allowed
    again = task(prefill, trials=2, search_seconds=0)
    assert isinstance(again.open(Candidate(METASCHEDULE)), Call)
    assert stored.read_bytes() == before
    refused = Twin(task(decode, trials=2, search_seconds=0))
    refused.prepare(refused.task.space.default)
    assert refused.prepare(Candidate(METASCHEDULE)) == "MetaSchedule found no candidate that could be timed"


def test_another_machine_times_and_is_told_apart(server: int) -> None:
    here, there = (task(problems(SHAPE, WORKLOAD)[1], rpc=rpc) for rpc in (None, f"127.0.0.1:{server}"))
    assert key_of(here).digest != key_of(there).digest
    assert str(key_of(there).device["isa"]) == f"at 127.0.0.1:{server}"
    twin = Twin(there)
    run = twin.prepare(there.space.default)
    assert not isinstance(run, str), run
    assert not isinstance(run(), str)
    seconds = run()
    assert seconds is not None
    assert 1e-7 < seconds < 1
    assert callable(twin.prepare(SCRIPTED))


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(MemcompileError, match="MC120 'nowhere' is no address of an RPC server"):
        task(problems(SHAPE, WORKLOAD)[1], rpc="nowhere")


def test_other_types_than_float32_are_refused() -> None:
    with pytest.raises(MemcompileError, match="MC123 the tvm backend computes in float32, not in bfloat16"):
        make_task("tvm", problems(SHAPE, WORKLOAD)[0], threads=1, dtype="bfloat16")


def store(database: Database, of: Task, seconds: dict[Candidate, float]) -> None:
    default = of.space.default
    winner = min(seconds, key=lambda c: seconds[c])
    shares = {c: s / seconds[default] for c, s in seconds.items()}
    gain = Gain(*[1 / shares[winner]] * 4)
    found = Found(winner, gain, {c: (s,) for c, s in seconds.items()}, shares, {}, len(seconds), True)
    database.store(Record.of(key_of(of), default, found, "2026-01-01"))


def test_lowering_takes_what_was_measured(tmp_path: Path) -> None:
    database = Database(tmp_path / "tuning.json")
    prefill, decode = (task(problem) for problem in problems(SHAPE, WORKLOAD))
    many = prefill.space.default
    tuned = Candidate(KERNELS, (("key_tile", 32), ("chunk", 512)))
    scripted = replace(SCRIPTED, parameters=(*SCRIPTED.parameters, ("chunk", 512)))
    store(database, prefill, {many: 3.0, tuned: 2.0, scripted: 2.5})
    store(database, decode, {decode.space.default: 2e-3, Candidate(KERNELS, (("splits", 4),)): 1e-3})
    program = build_program(captured_tiny("llama"))
    known = Tuned(WORKLOAD, database)
    interface = step_interface(program)
    kernels, choices = known.kernels(interface.states, interface.groups, 512, library=True)
    assert choices.chunk == 512
    sizes = AttentionSizes(4, 2, 16, 16, 0.25)
    choice = kernels.attention(sizes)
    assert isinstance(choice, Choice)
    assert (choice.key_tile, choice.splits) == (32, 4)
    assert "kernels key_tile=32 splits=4, 1.5" in str(choices.decisions[0]["decision"])
    # without the library, the tiles that were fastest; without a record, the default ones
    assert Kernels(False, known).attention(sizes) == AttentionTiles(32, 2, 12)
    assert Kernels(False, known).attention(replace(sizes, heads=2)) == AttentionTiles()
    # keys chosen at run time are the library's business alone
    assert kernels.attention(replace(sizes, pattern_block=64)) == Choice()
    assert isinstance(TvmBackend(database=database).tuned_for(WORKLOAD), TvmBackend)


def test_linear_layers_share_one_tile_for_prompts_and_decoding(tmp_path: Path) -> None:
    database = Database(tmp_path / "tuning.json")
    prefill, decode = (task(problem) for problem in products(32, 24, 512))

    def tile(columns: int, rows: int | None = None) -> Candidate:
        rest = (("columns", columns),)
        return Candidate(SCRIPT, rest if rows is None else (("rows", rows), *rest))

    known = Tuned(Workload(512, 1000), database)
    assert known.linear(32, 24) == {"rows": 4, "columns": 4}
    store(
        database, prefill, {tile(4, 4): 1.0, tile(8, 4): 0.5, tile(2, 8): 0.9, Candidate(METASCHEDULE): 0.1}
    )
    store(database, decode, {tile(4): 1e-3, tile(8): 2e-3, tile(2): 0.9e-3})
    # 1 + 1, 0.5 + 2 and 0.9 + 0.9 seconds: the tile that is best for prompts loses
    assert Tuned(Workload(512, 1000), database).linear(32, 24) == {"rows": 8, "columns": 2}
    assert Tuned(Workload(512, 10), database).linear(32, 24) == {"rows": 4, "columns": 8}
    assert Tuned(None, database).linear(32, 24) == {"rows": 4, "columns": 4}


def test_the_command_line_tunes_on_another_machine(
    server: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    database = ("--database", str(tmp_path / "tuning.json"))
    command = ["tune", "--engine", "tvm", "--product", "16x8", "--prompt-tokens", "16", "--threads", "1"]
    address = f"127.0.0.1:{server}"
    # no time but for the default
    assert main([*command, *database, "--rpc", address, "--time-budget", "0.001", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    (record,) = found["tuned"]
    assert (record["backend"], record["operator"]) == ("tvm", "linear.prefill")
    assert record["sizes"] == {"rows": 16, "width": 16, "features": 8}
    assert record["device"]["isa"] == f"at {address}"
    assert [left["operator"] for left in found["left"]] == ["linear.decode"]
    assert main(["tune", "--list", *database]) == 0
    assert "linear 16 x 16 -> 8" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--heads", "4", "--width", "16", "--rpc", "a:1"],
            "MC120 backend onnxruntime is timed on this machine",
        ),
        (["--product", "16x8"], "MC120 --product is given without --engine tvm"),
        (["--engine", "tvm", "--product", "16"], "MC120 '16' is no linear layer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) != 0
    assert message in capfd.readouterr().err
