"""The cache policy against a naive model: a list of positions, and what may be looked at."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcompile.artifact import GroupEntry
from memcompile.runtime.slots import SlotTable, capacity, held_tokens, strided_tokens


@st.composite
def groups(draw: st.DrawFn) -> GroupEntry:
    block = draw(st.integers(0, 5))
    stride = draw(st.integers(1, 5)) if block else 0
    return GroupEntry("g", "p", "positions", draw(st.integers(1, 12)), draw(st.integers(0, 6)), block, stride)


def visible(group: GroupEntry, position: int, query: int) -> bool:
    strided = group.stride > 0 and (position // group.block) % group.stride == 0
    return query - position < group.window or position < group.sinks or strided


@given(groups(), st.integers(1, 8), st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_every_visible_token_is_held_in_order_within_capacity(
    group: GroupEntry, slack: int, steps: list[int]
) -> None:
    steps = [min(step, slack) for step in steps]
    table = SlotTable(group, 2, capacity(group, sum(steps), slack))
    naive: list[int] = []
    cache = np.full(table.slots, -7)
    for step in steps:
        first = sum(1 for _ in naive) and naive[-1] + 1
        if table.room(1) < step:
            kept = table.compact(1, first)
            if kept is not None:
                cache[: len(kept)] = cache[kept]
        assert table.room(1) >= step
        cache[table.used[1] : table.used[1] + step] = range(first, first + step)
        table.append(1, first, step)
        naive += range(first, first + step)
        held = table.positions[1, : table.used[1]].tolist()
        assert held == cache[: len(held)].tolist() == sorted(set(held))
        for query in range(first, first + step):
            assert {p for p in naive if p <= query and visible(group, p, query)} <= set(held)
        assert (table.positions[1, table.used[1] :] == -1).all()
    assert table.used[0] == 0
    assert (table.positions[0] == -1).all()


@given(groups(), st.integers(0, 200))
def test_held_tokens_is_enough_and_not_wasteful(group: GroupEntry, total: int) -> None:
    for query in {total, max(total - 1, 0)}:
        needed = sum(visible(group, p, query) for p in range(query))
        assert needed <= held_tokens(group, total)
    assert held_tokens(group, total) <= total


@given(groups(), st.integers(0, 300))
def test_strided_tokens_counts_the_positions(group: GroupEntry, total: int) -> None:
    wanted = sum((p // group.block) % group.stride == 0 for p in range(total)) if group.stride else 0
    assert strided_tokens(group, total) == wanted


def test_a_group_without_a_window_never_drops() -> None:
    table = SlotTable(GroupEntry("full", "attention_mask"), 1, 8)
    table.append(0, 0, 8)
    assert table.compact(0, 1000) is None
    with pytest.raises(ValueError, match="1 tokens do not fit: 8 of 8 slots are used"):
        table.append(0, 8, 1)
    with pytest.raises(ValueError, match="7 slots are fewer than the 8 used"):
        table.resize(7)
