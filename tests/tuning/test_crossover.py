"""Where choosing begins to be faster: from measured gains to a switch, and the database that remembers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from memcompile.tuning import Database, crossover
from memcompile.tuning.crossover import Length, Rule, find_switch, switch_of

BLOCKS = Rule(4, 2, 16, pattern=((2, 2, 0, 0),) * 4, block=32)
PAGES = Rule(4, 2, 16, bits=8, page_tokens=16, page_keep=2)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths and times of a test."""
    monkeypatch.setattr(crossover, "LENGTHS", (64, 256, 4096))
    monkeypatch.setattr(crossover, "SECONDS_A_LENGTH", 0.2)


def test_the_switch_comes_after_the_last_length_that_gains_too_little() -> None:
    assert switch_of([(512, 0.9), (1024, 1.02), (2048, 1.2), (4096, 1.9)]).dense_tokens == 1024
    assert switch_of([(512, 1.2), (1024, 0.98), (2048, 1.2)]).dense_tokens == 1024
    # shorter prompts than the shortest are not judged by it
    assert switch_of([(512, 1.3), (1024, 1.4)]).dense_tokens == 512
    never = switch_of([(512, 0.8), (1024, 1.01)])
    assert never.dense_tokens == 1024
    assert never.sentence() == (
        "everything is looked at up to 1,024 keys: choosing was not faster on this machine"
    )


def test_the_sentence_says_where_and_what_it_gains() -> None:
    assert switch_of([(512, 0.8), (1024, 2.04)]).sentence() == (
        "keys are chosen from 512 on, as measured on this machine (2.0x as fast as dense attention at 1,024)"
    )


@pytest.mark.parametrize("rule", [BLOCKS, PAGES])
def test_what_was_measured_is_remembered(
    rule: Rule, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "tuning.json")
    found = find_switch(rule, database, most_tokens=300, threads=1)
    assert found is not None
    assert [tokens for tokens, _ in found.gains] == [64, 256]
    records = database.records().values()
    assert [record.key.operator for record in records] == [rule.operator] * 2
    assert str(Length.from_sizes(rule.operator, rule.sizes(256))).endswith("256: 4/2 heads of 16")

    def measured_again(*_: object) -> None:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(crossover, "_measured", measured_again)
    again = find_switch(rule, database, most_tokens=300, threads=1)
    assert again is not None
    assert again.dense_tokens == found.dense_tokens


def test_nothing_is_measured_where_nothing_can_be(short: None, tmp_path: Path) -> None:
    database = Database(tmp_path / "tuning.json")
    assert find_switch(BLOCKS, database, most_tokens=40, threads=1) is None
    by_mass = Rule(4, 2, 16, pattern=((3, 8, 900_000, 0),) * 4, block=32)
    assert find_switch(by_mass, database, most_tokens=300, threads=1) is None
    too_wide = Rule(4, 2, 512, pattern=((2, 2, 0, 0),) * 4, block=32)
    assert find_switch(too_wide, database, most_tokens=300, threads=1) is None
    assert database.records() == {}
