"""From records to what a region runs on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from memcompile.tuning import (
    DECODE,
    PREFILL,
    Ask,
    Candidate,
    Choice,
    Choices,
    Database,
    Key,
    Problem,
    Record,
    Shape,
    Workload,
    choose,
)
from memcompile.tuning.machine import fingerprint, versions
from memcompile.tuning.timing import Gain

SHAPE = Shape(8, 2, 64, bits=8)
PACKAGES = ("numpy",)
WORKLOAD = Workload(prompt_tokens=1000, new_tokens=100, threads=1)


def ours(**parameters: int) -> Candidate:
    return Candidate("kernels", tuple(parameters.items()))


def runtime(**parameters: int) -> Candidate:
    return Candidate("runtime", tuple(parameters.items()))


PREFILL_SECONDS = {
    ours(key_tile=0, chunk=512): 1.0,
    ours(key_tile=32, chunk=512): 0.8,
    ours(key_tile=0, chunk=256): 0.7,
    runtime(chunk=512): 1.1,
    runtime(chunk=256): 0.75,
}
DECODE_SECONDS = {ours(splits=0): 0.010, ours(splits=4): 0.008, runtime(): 0.004}


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database.at(tmp_path / "tuning.json")


def store(
    database: Database,
    operator: str,
    seconds: Mapping[Candidate, float],
    *,
    shape: Shape = SHAPE,
    tokens: int = 1000,
    winner: Candidate | None = None,
    versions_: Mapping[str, str] | None = None,
) -> None:
    sizes = Problem(operator, shape, tokens).sizes
    key = Key("onnxruntime", operator, sizes, "float32", fingerprint(1), versions_ or versions(PACKAGES))
    default = next(iter(seconds))
    best = winner or min(seconds, key=lambda c: seconds[c])
    times = {c: (s,) for c, s in seconds.items()}
    shares = {c: s / seconds[default] for c, s in seconds.items()}
    database.store(Record(key, default, best, Gain(1, 1, 1, 1), times, shares, {}, len(times), True, "now"))


def chosen(database: Database, *asks: Ask, workload: Workload = WORKLOAD) -> Choices:
    asks = asks or (Ask("0", SHAPE),)
    return choose(database, "onnxruntime", asks, workload, dtype="float32", packages=PACKAGES, chunk=512)


def test_without_records_it_is_our_kernels_with_automatic_parameters(database: Database) -> None:
    assert chosen(database) == Choices(512, {"0": Choice("kernels", 0, 0)})


def test_implementations_are_weighed_by_the_whole_workload(database: Database) -> None:
    store(database, PREFILL, {c: s for c, s in PREFILL_SECONDS.items() if c.get("chunk") == 512})
    store(database, DECODE, DECODE_SECONDS)
    # 1.1 s of prompt and 100 times 4 ms, against 0.8 s and 100 times 8 ms
    found = chosen(database)
    assert (found.chunk, found.regions["0"].implementation) == (512, "runtime")
    assert found.regions["0"].gain == pytest.approx((1.0 + 1.0) / (1.1 + 0.4))
    # with few new tokens the prompt decides
    few = chosen(database, workload=Workload(1000, 10, threads=1)).regions["0"]
    assert (few.implementation, few.key_tile, few.splits) == ("kernels", 32, 0)


def test_a_part_that_was_not_measured_keeps_the_default(database: Database) -> None:
    store(database, DECODE, DECODE_SECONDS)
    assert chosen(database) == Choices(512, {"0": Choice()})


def test_a_chunk_is_changed_when_all_regions_together_gain(database: Database) -> None:
    store(database, PREFILL, PREFILL_SECONDS)
    store(database, DECODE, {ours(splits=0): 0.001, runtime(): 0.004})
    found = chosen(database)
    assert (found.chunk, str(found.regions["0"])) == (256, "kernels")
    assert {"tuned": "prefill", "decision": "chunks of 256 tokens in place of 512"} in found.decisions
    # a region that was not measured might lose what the others gain
    other = Ask("1", Shape(8, 2, 32))
    assert chosen(database, Ask("0", SHAPE), other).chunk == 512


def test_a_gain_that_may_be_noise_changes_no_implementation(database: Database) -> None:
    store(database, PREFILL, {ours(key_tile=0, chunk=512): 1.0, runtime(chunk=512): 0.97})
    store(database, DECODE, {ours(splits=0): 0.001, runtime(): 0.001})
    found = chosen(database)
    assert found.regions["0"].implementation == "kernels"
    assert found.decisions[0]["decision"] == "kernels: the default was not beaten"


def test_parameters_that_did_not_win_their_race_stay_automatic(database: Database) -> None:
    default = ours(key_tile=0, chunk=512)
    store(database, PREFILL, {default: 1.0, ours(key_tile=32, chunk=512): 0.99}, winner=default)
    store(database, DECODE, {ours(splits=0): 0.001, ours(splits=4): 0.0005})
    found = chosen(database).regions["0"]
    assert str(found) == "kernels splits=4"
    assert found.gain == pytest.approx(1.1 / 1.05)


@pytest.mark.parametrize(
    ("tokens", "counts"), [(1000, True), (600, True), (1900, True), (400, False), (2100, False)]
)
def test_another_length_counts_within_a_factor_of_two(tokens: int, counts: bool, database: Database) -> None:
    for operator, seconds in ((PREFILL, PREFILL_SECONDS), (DECODE, DECODE_SECONDS)):
        store(database, operator, seconds, tokens=tokens)
    assert bool(chosen(database).decisions) == counts


def test_an_evicted_cache_is_looked_up_by_what_it_keeps(database: Database) -> None:
    store(database, PREFILL, {ours(key_tile=0, chunk=512): 1.0})
    store(database, DECODE, {ours(splits=0): 0.010, ours(splits=4): 0.008}, tokens=100)
    assert chosen(database, Ask("0", SHAPE, held_tokens=100)).regions["0"].splits == 4
    assert chosen(database, Ask("0", SHAPE)).regions["0"].splits == 0


def test_other_versions_do_not_count(database: Database) -> None:
    for operator, seconds in ((PREFILL, PREFILL_SECONDS), (DECODE, DECODE_SECONDS)):
        store(database, operator, seconds, versions_={"numpy": "0.1"})
    assert chosen(database) == Choices(512, {"0": Choice()})


def test_a_decision_names_the_regions_that_share_it(database: Database) -> None:
    store(database, PREFILL, {ours(key_tile=0, chunk=512): 1.0, ours(key_tile=32, chunk=512): 0.5})
    store(database, DECODE, {ours(splits=0): 1e-9})
    found = chosen(database, Ask("0", SHAPE), Ask("1", SHAPE))
    assert found.decisions == (
        {
            "tuned": "attention",
            "regions": "0, 1",
            "decision": "kernels key_tile=32, 2.00x as fast as the default over the workload",
        },
    )


def test_an_implementation_that_won_no_race_is_not_chosen(database: Database) -> None:
    default = ours(key_tile=0, chunk=512)
    store(database, PREFILL, {default: 1.0, runtime(chunk=512): 0.7}, winner=default)
    store(database, DECODE, {ours(splits=0): 0.001, runtime(): 0.001})
    assert chosen(database).regions["0"].implementation == "kernels"
