"""Rounds, paired gains, and what a neighbour's load does to them."""

from __future__ import annotations

import pytest

from memcompile.tuning import Candidate
from memcompile.tuning.timing import FIRST_ROUNDS, Gain, Race
from tests.tuning.machines import TWO, Machine

SLOW, FAST = TWO.default, Candidate("theirs")
BEHIND, ABSURD = (Candidate("ours", (("tile", 2), ("chunk", chunk))) for chunk in (4, 8))
COSTS = {SLOW: 0.2, FAST: 0.1, BEHIND: 0.25, ABSURD: 0.9}


def race(machine: Machine, seed: int = 0) -> Race:
    return Race({c: machine.runner(c) for c in COSTS}, clock=machine.clock, seed=seed)


def test_candidates_take_turns_and_the_default_runs_in_every_round() -> None:
    machine = Machine(COSTS.__getitem__)
    found = race(machine)
    found.run(6, deadline=1e9)
    assert found.rounds == 6
    assert list(found.times[SLOW]) == list(range(6))
    # whoever is far behind after the first rounds is not called again, whoever is absurd is called once
    assert list(found.times[BEHIND]) == list(range(FIRST_ROUNDS))
    assert list(found.times[ABSURD]) == [0]
    assert found.ranking() == [FAST, SLOW, BEHIND, ABSURD]


def test_the_order_of_a_round_depends_on_the_seed_alone() -> None:
    orders = []
    for seed in (1, 1, 2):
        machine = Machine(COSTS.__getitem__)
        race(machine, seed=seed).run(6, deadline=1e9)
        orders.append(machine.calls)
    assert orders[0] == orders[1] != orders[2]


def test_a_round_is_finished_and_the_next_is_not_begun_after_the_deadline() -> None:
    machine = Machine(COSTS.__getitem__)
    found = race(machine)
    found.run(9, deadline=0.01)
    assert (found.rounds, set(found.times)) == (1, set(COSTS))
    found.run(9, deadline=0.01, least=3)
    assert found.rounds == 3


def test_load_that_comes_and_goes_does_not_change_the_gain() -> None:
    noisy = Machine(COSTS.__getitem__, noise={(0.0, 3.0): 4.0, (6.0, 9.0): 3.0})
    found = race(noisy)
    found.run(12, deadline=1e9)
    gain = found.gain(FAST)
    assert gain.best == pytest.approx(2.0)
    assert gain.low <= gain.median <= gain.high


def test_calls_that_share_one_work_count_for_all_of_it() -> None:
    machine = Machine(COSTS.__getitem__)
    found = Race({c: machine.runner(c) for c in COSTS}, lambda c: 10.0 if c == FAST else 1.0, machine.clock)
    found.run(1, deadline=1e9)
    assert found.seconds(FAST) == pytest.approx(1.0)
    assert found.ranking()[-1] == FAST


def test_a_gain_compares_only_rounds_that_both_ran_in() -> None:
    gain = Gain.of({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 0.5})
    assert (gain.best, gain.median) == (2.0, 3.0)
    assert gain.worth(1.9)
    assert not gain.worth(2.1)


def test_one_lucky_round_is_not_worth_a_change() -> None:
    gain = Gain.of({0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.5, 1: 1.1, 2: 1.1})
    assert gain.best == 2.0
    assert not gain.worth(1.02)


def test_what_a_quarter_of_the_rounds_contradicts_is_not_worth_a_change() -> None:
    gain = Gain.of(dict.fromkeys(range(5), 1.0), {0: 0.7, 1: 0.7, 2: 0.7, 3: 1.2, 4: 1.2})
    assert gain.safe == pytest.approx(1 / 0.7)
    assert gain.low < 1
    assert not gain.worth(1.02)
