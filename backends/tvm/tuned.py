"""Which kernels a lowered program gets, by what `memcompile tune` measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final

from memcompile.artifact.manifest import GroupEntry, StateEntry
from memcompile.backends.tvm.kernels import AttentionSizes, AttentionTiles, library_takes
from memcompile.backends.tvm.timed import BACKEND, COLUMNS, PACKAGES, ROWS, SCRIPT, TILES
from memcompile.tuning import (
    KERNELS,
    PREFILL,
    PRODUCT_DECODE,
    PRODUCT_PREFILL,
    Ask,
    Candidate,
    Choice,
    Choices,
    Database,
    Record,
    Shape,
    Workload,
    choose,
)
from memcompile.tuning.choice import NEAR
from memcompile.tuning.machine import fingerprint, versions

# tiles of linear layers that were measured as faster by less are not worth another kernel
WORTH: Final = 1.05


@dataclass(frozen=True)
class Tuned:
    """What is known for a workload; without one, or without records, everything stays as it is by default."""

    workload: Workload | None = None
    database: Database = field(default_factory=lambda: Database.at(None))

    def kernels(
        self, states: Sequence[StateEntry], groups: Sequence[GroupEntry], chunk: int, *, library: bool
    ) -> tuple[Kernels, Choices]:
        """What attention runs on, by its sizes, and the chunk; `chunk` is the default one. Raises MC122."""
        if self.workload is None:
            return Kernels(library, self), Choices(chunk, {})
        by_name = {group.name: group for group in groups}
        asks = []
        for state in states:
            group = by_name[state.group]
            shape = Shape(
                state.heads or state.kv_heads, state.kv_heads, state.head_dim, state.bits, group.window,
                group.sinks, group.block, group.stride,
            )  # fmt: skip
            asks.append(Ask(state.region, shape, _held(group, self.workload)))
        choices = choose(
            self.database, BACKEND, asks, self.workload, dtype="float32", packages=PACKAGES, chunk=chunk
        )
        # the regions of a shape share one kernel
        chosen = {ask.shape: choices.regions[ask.region] for ask in reversed(asks)}
        return Kernels(library, self, chosen), choices

    def tiles(self, sizes: AttentionSizes) -> AttentionTiles:
        """The tiles of the kernel in TVMScript that read a prompt fastest."""
        shape = {**asdict(_shape(sizes)), "batch": 1}
        near = [r for r in self._records if r.key.operator == PREFILL and self._is_near(r, shape)]
        record = min(near, key=self._distance, default=None)
        if record is None:
            return AttentionTiles()
        tried = [c for c in record.seconds if c.implementation == SCRIPT]
        best = min(tried, key=record.estimate, default=None)
        return AttentionTiles() if best is None else AttentionTiles(*(best.get(p.name) for p in TILES))

    def linear(self, width: int, features: int) -> dict[str, int]:
        """Rows and columns of the register tile of a linear layer; prompts and decoding share the kernel."""
        default = {"rows": ROWS.default, "columns": COLUMNS.default}
        by_operator = {
            r.key.operator: r
            for r in self._records
            if (r.key.sizes.get("width"), r.key.sizes.get("features")) == (width, features)
        }
        prompt, step = by_operator.get(PRODUCT_PREFILL), by_operator.get(PRODUCT_DECODE)
        if self.workload is None or step is None:
            return default
        totals: dict[tuple[int, int], float] = {}
        for rows in ROWS.choices:
            for columns in COLUMNS.choices:
                one = Candidate(SCRIPT, (("columns", columns),))
                many = Candidate(SCRIPT, (("rows", rows), ("columns", columns)))
                if one in step.seconds and (prompt is None or many in prompt.seconds):
                    seconds = step.estimate(one) * self.workload.new_tokens
                    if prompt is not None:
                        chunks = self.workload.prompt_tokens / prompt.key.sizes["rows"]
                        seconds += prompt.estimate(many) * chunks * self.workload.batch
                    totals[rows, columns] = seconds
        usual = (ROWS.default, COLUMNS.default)
        if usual not in totals:
            return default
        best = min(totals, key=lambda tile: totals[tile])
        return dict(zip(default, best if totals[usual] >= WORTH * totals[best] else usual, strict=True))

    @cached_property
    def _records(self) -> list[Record]:
        if self.workload is None or not (stored := self.database.records().values()):
            return []
        context: dict[str, Any] = {
            "backend": BACKEND,
            "dtype": "float32",
            "device": fingerprint(self.workload.threads),
            "versions": versions(PACKAGES),
        }
        return [r for r in stored if context.items() <= r.key.as_dict().items()]

    def _is_near(self, record: Record, shape: dict[str, int]) -> bool:
        sizes = {name: value for name, value in record.key.sizes.items() if name != "tokens"}
        return sizes == shape and self._distance(record) <= math.log(NEAR)

    def _distance(self, record: Record) -> float:
        assert self.workload is not None
        return abs(math.log(record.key.sizes["tokens"] / self.workload.prompt_tokens))


@dataclass(frozen=True)
class Kernels:
    """What a function's converters ask: whether the library is linked, and what was measured."""

    library: bool = False
    tuned: Tuned = field(default_factory=Tuned)
    chosen: Mapping[Shape, Choice] = field(default_factory=dict)

    def attention(self, sizes: AttentionSizes) -> Choice | AttentionTiles:
        """The library with its parameters, or the tiles of the kernel in TVMScript."""
        choice = self.chosen.get(_shape(sizes), Choice())
        usual = sizes.pattern_block or choice.implementation == KERNELS
        if self.library and library_takes(sizes) and usual:
            return Choice() if sizes.pattern_block else choice
        return self.tuned.tiles(sizes)


def _shape(sizes: AttentionSizes) -> Shape:
    return Shape(
        sizes.heads, sizes.kv_heads, sizes.width, sizes.bits, sizes.window, sizes.sinks, sizes.block,
        sizes.stride,
    )  # fmt: skip


def _held(group: GroupEntry, workload: Workload) -> int | None:
    if group.evict is None:
        return None
    kept = group.evict.keep_tokens or int((group.evict.keep_fraction or 1) * workload.prompt_tokens)
    return max(1, min(kept, workload.prompt_tokens))
