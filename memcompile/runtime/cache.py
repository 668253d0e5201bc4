"""The state of a batch of sequences: cache buffers, and which tokens they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import GroupEntry, Manifest, StateEntry
from memcompile.errors import MemcompileError
from memcompile.runtime.buffers import Array, Buffer, aligned_zeros, new_buffer
from memcompile.runtime.slots import DECODE_SLACK_TOKENS, SlotTable, capacity

NEW: Final = "new"
PREFILLED: Final = "prefilled"
DECODING: Final = "decoding"


@dataclass(slots=True)
class Caches:
    """The buffers of one region. `observed` are the queries that `compress` scores with, until it has run."""

    entry: StateEntry
    key: Buffer
    value: Buffer
    observed: Buffer | None = None
    observed_next: Buffer | None = None
    bounds: Buffer | None = None
    neurons: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the region."""
        buffers = (self.key, self.value, self.observed, self.observed_next, self.bounds)
        held = sum(buffer.nbytes for buffer in buffers if buffer is not None)
        return held if self.neurons is None else held + int(self.neurons.nbytes)


class State:
    """Everything that a batch carries between calls.

    Made by `Session.new_state` for prompts of at most `prompt_tokens` and `new_tokens` after them. Rows are
    prefilled one by one; `finish_prefill` then gives back the slots that only prefill needed. Slots per row:
    full groups prompt + new; windowed groups window + sinks + strided blocks + one chunk, after prefill + 64
    instead of the chunk; evicted groups the prompt, after `replace_group` the kept tokens + new.
    """

    def __init__(
        self, manifest: Manifest, batch: int, prompt_tokens: int, new_tokens: int, *, device: str = "cpu"
    ) -> None:
        self.manifest = manifest
        self.batch = batch
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.chunk_tokens = max(1, min(manifest.prefill.chunk_tokens, prompt_tokens))
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self.taken_tokens = 0
        self.phase: str = NEW
        self.compressed = False
        # Changes when a buffer is replaced: whoever has bound the old ones binds again.
        self.generation = 0
        self.device = device
        self.tables = {g.name: SlotTable(g, batch, self._prefill_slots(g)) for g in manifest.groups}
        self.caches = [self._new_caches(entry) for entry in manifest.states]

    @property
    def total_tokens(self) -> int:
        """The most tokens a row may reach."""
        return self.prompt_tokens + self.new_tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all state buffers now."""
        return sum(caches.nbytes for caches in self.caches)

    def members(self, group: GroupEntry) -> list[Caches]:
        """The caches of a group, in the order of the manifest."""
        return [caches for caches in self.caches if caches.entry.group == group.name]

    def reserve(self, row: int, tokens: int) -> int:
        """Free slots for the next tokens of a row; gives how many of `tokens` fit in one call, 1 or more."""
        for table in self.tables.values():
            if table.room(row) >= tokens:
                continue
            if table.group.window:
                self._compact(table, row, int(self.lengths[row]))
                tokens = min(tokens, table.room(row))
            else:
                self._grow(table, tokens)
        return tokens

    def reserve_one_each(self) -> None:
        """Free one slot in every row: in a common decode step each row writes its own next slot."""
        for table in self.tables.values():
            if table.slots - int(table.used.max()) >= 1:
                continue
            if table.group.window:
                for row in range(self.batch):
                    self._compact(table, row, int(self.lengths[row]))
            else:
                self._grow(table, 1)

    def append(self, row: int, tokens: int) -> None:
        """Record that `tokens` tokens were written to a row."""
        first = int(self.lengths[row])
        for table in self.tables.values():
            table.append(row, first, tokens)
        self.lengths[row] += tokens

    def append_one_each(self) -> None:
        """Record that one token was written to every row."""
        rows = np.arange(self.batch)
        for table in self.tables.values():
            table.positions[rows, table.used] = self.lengths
            table.used += 1
        self.lengths += 1

    def count_new(self, tokens: int) -> None:
        """Account for tokens after the prompt. Raises MC120 past the size the state was made for."""
        if self.phase == NEW:
            raise MemcompileError(
                "MC120", "a state must be prefilled before it decodes", fix="call prefill first"
            )
        if self.taken_tokens + tokens > self.new_tokens:
            raise MemcompileError(
                "MC120",
                f"the state was made for {self.new_tokens} new tokens: {self.taken_tokens} were taken, "
                f"{tokens} more do not fit",
                fix="make the state with more new_tokens",
            )
        if self.phase == PREFILLED:
            # nothing is compressed after the first decoded token
            self.phase = DECODING
            self._drop_observed()
            self.generation += 1
        self.taken_tokens += tokens

    def finish_prefill(self) -> None:
        """Shrink windowed groups to what decoding needs."""
        self.phase = PREFILLED
        for table in self.tables.values():
            if not table.group.window:
                continue
            for row in range(self.batch):
                self._compact(table, row, int(self.lengths[row]))
            slots = capacity(table.group, self.total_tokens, DECODE_SLACK_TOKENS)
            if slots < table.slots:
                self._resize(table, slots)

    def replace_group(
        self, group: GroupEntry, positions: list[NDArray[np.int64]], kept: list[list[Array]]
    ) -> None:
        """Put the compressed caches of a group in place of the prompt's.

        positions: held positions a row; kept: key, value of every member, each [G,n,D], a row.
        """
        table = self.tables[group.name]
        slots = max(len(held) for held in positions) + self.new_tokens
        table.load(positions, max(1, slots))
        for index, caches in enumerate(self.members(group)):
            for part, name in enumerate(("key", "value")):
                old: Buffer = getattr(caches, name)
                batch, heads, _, width = old.shape
                # the prompt's buffer goes before the next one comes
                setattr(caches, name, None)
                del old
                new = new_buffer((batch, heads, table.slots, width), caches.entry.dtype, self.device)
                for row in range(batch):
                    new.store(row, kept[row][2 * index + part][:, : len(positions[row])])
                setattr(caches, name, new)
        self.generation += 1

    def finish_compress(self) -> None:
        """Record that the evicted groups hold what they keep."""
        self.compressed = True
        self._drop_observed()
        self.generation += 1

    def _drop_observed(self) -> None:
        for caches in self.caches:
            caches.observed = caches.observed_next = None

    def _prefill_slots(self, group: GroupEntry) -> int:
        if group.evict is not None:
            return max(1, self.prompt_tokens)
        return capacity(group, self.total_tokens, max(self.chunk_tokens, 1))

    def _new_caches(self, entry: StateEntry) -> Caches:
        group = self.manifest.group(entry.group)
        shape = (self.batch, entry.kv_heads, self.tables[group.name].slots, entry.stored_width)
        key, value = (new_buffer(shape, entry.dtype, self.device) for _ in range(2))
        caches = Caches(entry, key, value)
        if entry.observed_in is not None and group.evict is not None:
            dtype = self._dtype(entry.observed_in)
            # two: the graph reads the old queries while it writes the new ones
            seen = (self.batch, entry.heads, group.evict.observe_tokens, entry.head_dim)
            caches.observed, caches.observed_next = (new_buffer(seen, dtype, self.device) for _ in range(2))
        if entry.page_tokens:
            # the group keeps every token and never grows (checked when the manifest is read)
            pages = -(-shape[2] // entry.page_tokens)
            bounds = (self.batch, entry.kv_heads, pages, 2 * entry.stored_width)
            caches.bounds = new_buffer(bounds, entry.dtype, self.device)
        if entry.neurons:
            caches.neurons = aligned_zeros((self.batch, entry.neurons), "float32")
        return caches

    def _dtype(self, name: str) -> str:
        return next(t.dtype for t in self.manifest.functions["step"].inputs if t.name == name)

    def _compact(self, table: SlotTable, row: int, next_position: int) -> None:
        kept = table.compact(row, next_position)
        if kept is None:
            return
        for caches in self.members(table.group):
            caches.key.move(row, kept)
            caches.value.move(row, kept)

    def _grow(self, table: SlotTable, tokens: int) -> None:
        """An evicted group that was not compressed goes on with its whole prompt; nothing else ever grows."""
        if table.group.evict is None or int(table.used.max()) + tokens > self.total_tokens:
            raise MemcompileError(
                "MC901",
                f"group {table.group.name!r} has {table.slots} slots and no room for {tokens} more tokens",
            )
        self._resize(table, self.total_tokens)

    def _resize(self, table: SlotTable, slots: int) -> None:
        used = int(table.used.max())
        table.resize(slots)
        for caches in self.members(table.group):
            caches.key = caches.key.resized(slots, used)
            caches.value = caches.value.resized(slots, used)
        self.generation += 1
