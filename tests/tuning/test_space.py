"""A space lists what may be tried, and nothing else."""

from __future__ import annotations

import pytest

from memcompile.tuning import Candidate, Parameter, Space
from tests.tuning.machines import TWO

DEFAULT = Candidate("ours", (("tile", 0), ("chunk", 4)))


def test_every_combination_of_every_implementation_the_default_first() -> None:
    found = TWO.candidates({})
    assert found[0] == TWO.default == DEFAULT
    assert len(found) == len(set(found)) == 3 * 2 + 1
    assert Candidate("theirs") in found


def test_the_rule_bars_candidates_but_never_the_default() -> None:
    space = Space("toy", TWO.implementations, lambda c, sizes: c.get("chunk") > sizes["least"])
    assert space.candidates({"least": 4}) == (
        DEFAULT,
        *(Candidate("ours", (("tile", tile), ("chunk", 8))) for tile in (0, 1, 2)),
    )


def test_a_neighbour_differs_by_one_step_of_one_parameter() -> None:
    around = TWO.neighbours(Candidate("ours", (("tile", 1), ("chunk", 8))), {})
    assert {(c.get("tile"), c.get("chunk")) for c in around} == {(0, 8), (2, 8), (1, 4)}
    assert TWO.neighbours(Candidate("theirs"), {}) == ()


def test_a_default_that_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="the default 3 is not among"):
        Parameter("tile", (1, 2), 3)


def test_a_candidate_survives_json() -> None:
    assert Candidate.from_dict(DEFAULT.as_dict()) == DEFAULT
    assert str(DEFAULT) == "ours tile=0 chunk=4"
