"""What a search finds, what it refuses, and when it stops."""

from __future__ import annotations

import pytest

from memcompile.tuning import Candidate, Settings, Space
from memcompile.tuning.search import Found, Search
from tests.tuning.machines import LARGE, TWO, Cost, Machine, distance_to

BEST = Candidate("ours", (("tile", 2), ("chunk", 8)))


def search(cost: Cost, space: Space = TWO, seconds: float = 1e6, seed: int = 0) -> tuple[Found, Machine]:
    machine = Machine(cost)
    settings = Settings(seconds=seconds, seed=seed)
    return Search(space, {}, machine.runner, settings, clock=machine.clock).run(), machine


def test_a_small_space_is_tried_whole() -> None:
    found, _ = search(distance_to(tile=2, chunk=8))
    assert found.winner == BEST
    assert found.exhaustive
    assert len(found.seconds) == found.space_size == 7
    assert found.gain.best == pytest.approx((1 + 2 + 4) / 1)


def test_the_default_stays_when_nothing_is_worth_a_change() -> None:
    found, _ = search(lambda c: 0.099 if c == BEST else 0.1)
    assert found.winner == TWO.default
    assert found.gain.best == 1.0


def test_a_large_space_is_searched_from_the_best_of_a_sample() -> None:
    found, _ = search(distance_to(a=5, b=2, c=6), LARGE)
    assert found.winner == Candidate("ours", (("a", 5), ("b", 2), ("c", 6)))
    assert not found.exhaustive
    assert len(found.seconds) < found.space_size == 512


def test_the_same_seed_tries_the_same_candidates() -> None:
    tried = [list(search(distance_to(a=5), LARGE, seed=seed)[0].seconds) for seed in (3, 3, 4)]
    assert tried[0] == tried[1] != tried[2]


def test_a_search_without_time_still_compares_the_best_with_the_default() -> None:
    found, machine = search(distance_to(tile=2, chunk=8), seconds=0.001)
    assert found.winner == BEST
    # one round of everybody, then the fewest rounds of the duel
    assert len(found.seconds[TWO.default]) == 1 + 3
    assert machine.now < 20


def test_refused_candidates_are_not_timed() -> None:
    machine = Machine(distance_to(tile=2, chunk=8))
    found = Search(
        TWO, {}, lambda c: "wrong" if c == BEST else machine.runner(c), Settings(), clock=machine.clock
    ).run()
    assert found.refused == {BEST: "wrong"}
    assert BEST not in machine.calls
    assert found.winner != BEST
    assert found.exhaustive


def test_a_default_that_cannot_run_ends_the_search() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        Search(TWO, {}, lambda c: "no kernel").run()
