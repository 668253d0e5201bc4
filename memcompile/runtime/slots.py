"""Which tokens a group still holds, and in which slots: the cache policy, without the caches."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import GroupEntry

Positions = NDArray[np.int64]
EMPTY: Final = -1

# Free slots of a windowed cache while decoding: it is compacted once in so many tokens.
DECODE_SLACK_TOKENS: Final = 64


def strided_tokens(group: GroupEntry, total_tokens: int) -> int:
    """How many of the first `total_tokens` positions lie in a block that stays visible."""
    if not group.stride:
        return 0
    period = group.block * group.stride
    return total_tokens // period * group.block + min(total_tokens % period, group.block)


def held_tokens(group: GroupEntry, total_tokens: int) -> int:
    """The most of `total_tokens` tokens that one row of the group has to hold for later queries."""
    if not group.window:
        return total_tokens
    return min(total_tokens, group.window + group.sinks + strided_tokens(group, total_tokens))


def capacity(group: GroupEntry, total_tokens: int, slack_tokens: int) -> int:
    """Slots to allocate: what must be held, and `slack_tokens` for new tokens before the next compaction."""
    return max(1, min(total_tokens, held_tokens(group, total_tokens) + slack_tokens))


class SlotTable:
    """The position held by each slot of each row of one group; -1 is an empty slot.

    Slots `0 .. used[row]-1` are written; new tokens go to the slots after them. A windowed group frees slots
    by `compact`, which keeps the order of positions.
    """

    def __init__(self, group: GroupEntry, batch: int, slots: int) -> None:
        self.group = group
        self.positions: Positions = np.full((batch, slots), EMPTY, np.int64)
        self.used: Positions = np.zeros(batch, np.int64)

    @property
    def slots(self) -> int:
        """Slots of each row."""
        return int(self.positions.shape[1])

    def room(self, row: int) -> int:
        """Free slots of a row."""
        return self.slots - int(self.used[row])

    def needed(self, row: int, next_position: int) -> NDArray[np.bool_]:
        """For each used slot: can a query at `next_position` or later look at it?"""
        held = self.positions[row, : self.used[row]]
        group = self.group
        if not group.window:
            return np.ones(len(held), np.bool_)
        seen = (next_position - held < group.window) | (held < group.sinks)
        if group.stride:
            seen |= (held // group.block) % group.stride == 0
        return seen

    def compact(self, row: int, next_position: int) -> Positions | None:
        """Drop what no query from `next_position` on can see.

        Returns the old slots of the kept tokens in their new order, None when nothing was dropped.
        """
        needed = self.needed(row, next_position)
        if needed.all():
            return None
        kept = np.flatnonzero(needed)
        self.positions[row, : len(kept)] = self.positions[row, kept]
        self.positions[row, len(kept) :] = EMPTY
        self.used[row] = len(kept)
        return kept

    def append(self, row: int, first_position: int, tokens: int) -> None:
        """Take the next `tokens` slots of a row for consecutive positions."""
        start = int(self.used[row])
        if start + tokens > self.slots:
            raise ValueError(f"{tokens} tokens do not fit: {start} of {self.slots} slots are used")
        self.positions[row, start : start + tokens] = np.arange(first_position, first_position + tokens)
        self.used[row] = start + tokens

    def resize(self, slots: int) -> None:
        """Change the slots of each row; used ones are never cut off."""
        if slots < self.used.max():
            raise ValueError(f"{slots} slots are fewer than the {self.used.max()} used")
        batch = len(self.used)
        positions = np.full((batch, slots), EMPTY, np.int64)
        shared = min(slots, self.slots)
        positions[:, :shared] = self.positions[:, :shared]
        self.positions = positions

    def load(self, rows: list[Positions], slots: int) -> None:
        """Replace the table: the held positions of each row, and the new number of slots."""
        self.positions = np.full((len(rows), slots), EMPTY, np.int64)
        for row, held in enumerate(rows):
            self.positions[row, : len(held)] = held
            self.used[row] = len(held)
