"""From how many keys on choosing among them is faster than looking at all: measured once, and remembered.

At each length the kernels race dense attention against the choice, as any other implementations do; the
length where the choice begins to win, and keeps winning, is where a region switches.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from memcompile.progress import SILENT, Progress
from memcompile.tuning.database import Database
from memcompile.tuning.machine import fingerprint, versions
from memcompile.tuning.records import Key, Record
from memcompile.tuning.search import Search, Settings
from memcompile.tuning.space import Candidate, Sizes, Space
from memcompile.tuning.timing import Run

SPARSE: Final = "attention.sparse"
READING: Final = f"{SPARSE}.prefill"
DECODING: Final = f"{SPARSE}.decode"
DENSE: Final = "dense"
CHOOSING: Final = "choosing"
LENGTHS: Final = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
Products = Literal["float32", "bfloat16"]
# queries of one call: a chunk of the prompt
CHUNK_TOKENS: Final = 2048
# a switch has to gain this much: a prompt is never slower for it by what two runs of the same code differ
WORTH: Final = 1.03
SECONDS_A_LENGTH: Final = 1.5
PACKAGES: Final = ("kernels",)
# every so many keys one matters more than its neighbours, as in trained models
HEAVY_EVERY: Final = 37
SEED: Final = 0
# the antidiagonal kind of memcompile/dialect/selection.py, which is not imported here: it needs torch
KEEPS_MASS: Final = 3


@dataclass(frozen=True)
class Rule:
    """How a region chooses: a pattern [H,4] in blocks while reading, or pages while decoding."""

    heads: int
    kv_heads: int
    width: int
    bits: int = 0
    pattern: tuple[tuple[int, int, int, int], ...] = ()
    block: int = 0
    page_tokens: int = 0
    page_keep: int = 0
    products: Products = "float32"

    @property
    def depends_on_text(self) -> bool:
        """Whether how much is kept depends on what is read: random numbers say nothing of it."""
        return any(row[0] == KEEPS_MASS for row in self.pattern)

    @property
    def operator(self) -> str:
        return DECODING if self.page_tokens else READING

    def sizes(self, tokens: int) -> dict[str, int]:
        """What the times at a length depend on; of a pattern its checksum."""
        found = {name: getattr(self, name) for name in ("heads", "kv_heads", "width", "bits")}
        if self.page_tokens:
            return {**found, "page_tokens": self.page_tokens, "page_keep": self.page_keep, "tokens": tokens}
        digest = zlib.crc32(np.array(self.pattern, np.int32).tobytes())
        return {**found, "pattern": digest, "block": self.block, "tokens": tokens}


@dataclass(frozen=True, slots=True)
class Length:
    """A length at which a rule was measured, as a record of the database tells it."""

    operator: str
    sizes: Sizes

    @classmethod
    def from_sizes(cls, operator: str, sizes: Sizes) -> Length:
        return cls(operator, sizes)

    def __str__(self) -> str:
        part = self.operator.rpartition(".")[2]
        heads = f"{self.sizes['heads']}/{self.sizes['kv_heads']} heads of {self.sizes['width']}"
        return f"choosing in {part} {self.sizes['tokens']:,}: {heads}"


@dataclass(frozen=True, slots=True)
class Switch:
    """Up to so many keys a region looks at all of them. `gains`: the choice's speed over dense, by length."""

    dense_tokens: int
    gains: tuple[tuple[int, float], ...]

    def sentence(self) -> str:
        """Where it switches, for the report."""
        tokens, gain = self.gains[-1]
        if self.dense_tokens >= tokens:
            return f"everything is looked at up to {tokens:,} keys: choosing was not faster on this machine"
        return (
            f"keys are chosen from {self.dense_tokens:,} on, as measured on this machine "
            f"({gain:.1f}x as fast as dense attention at {tokens:,})"
        )


def find_switch(
    rule: Rule, database: Database, *, most_tokens: int, threads: int, progress: Progress = SILENT
) -> Switch | None:
    """Measure, or remember, where `rule` begins to win, at lengths up to `most_tokens`.

    None where nothing can be measured: no kernel takes the sizes, no length is within reach, or what is kept
    depends on the text.
    Raises MC122 for a database that cannot be used.
    """
    lengths = [] if rule.depends_on_text else [length for length in LENGTHS if length <= most_tokens]
    known = database.records()
    found: list[tuple[int, float]] = []
    for index, length in enumerate(lengths):
        sizes = rule.sizes(length)
        key = Key("cpu", rule.operator, sizes, rule.products, fingerprint(threads), versions(PACKAGES))
        record = known.get(key.digest)
        if record is None:
            record = _measured(rule, length, threads, key)
            if record is None:
                return None
            database.store(record)
        progress.update(index + 1, len(lengths))
        found.append((length, 1 / record.shares[Candidate(CHOOSING)]))
    return switch_of(found) if found else None


def switch_of(gains: Sequence[tuple[int, float]]) -> Switch:
    """The switch by measured gains, shortest length first: after the last length that gains too little."""
    dense = 0
    for tokens, gain in gains:
        if gain < WORTH:
            dense = tokens
    # shorter than the shortest that was measured, nothing is known
    return Switch(max(dense, gains[0][0]), tuple(gains))


def _measured(rule: Rule, tokens: int, threads: int, key: Key) -> Record | None:
    from datetime import UTC, datetime

    call = Call(rule, tokens, threads)
    # loads torch and the kernels, which is no part of the search's time
    call.taken(False)
    space = Space(rule.operator, {DENSE: (), CHOOSING: ()})

    def prepare(candidate: Candidate) -> Run | str:
        choosing = candidate.implementation == CHOOSING
        return call.run(choosing) if call.taken(choosing) else "no kernel takes these sizes"

    search = Search(space, key.sizes, prepare, Settings(SECONDS_A_LENGTH, rounds=4))
    try:
        found = search.run()
    except ValueError:
        return None
    if Candidate(CHOOSING) not in found.shares:
        return None
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return Record.of(key, space.default, found, when)


@dataclass
class Call:
    """One call of the kernels at a length: a chunk at the prompt's end, or a token after it."""

    rule: Rule
    tokens: int
    threads: int
    _tensors: dict[str, Any] = field(default_factory=dict)

    def taken(self, choosing: bool) -> bool:
        """Whether the kernels run it."""
        return self._attend(choosing) is not None

    def run(self, choosing: bool) -> Run:
        def once() -> None:
            self._attend(choosing)

        return once

    def _attend(self, choosing: bool) -> Any:
        from memcompile.dialect.cpu_attention import kernel_attention

        if not self._tensors:
            self._make()
        given, chosen = self._tensors, {}
        if choosing and self.rule.page_tokens:
            names = ("page_tokens", "page_keep")
            chosen = {"bounds": given["bounds"], **{name: getattr(self.rule, name) for name in names}}
        elif choosing:
            chosen = {"pattern": given["pattern"], "pattern_block": self.rule.block}
        return kernel_attention(
            given["q"], given["k"], given["v"], scale=self.rule.width**-0.5, threads=self.threads,
            k_scale=given["scale"], v_scale=given["scale"], products=self.rule.products, **chosen,
        )  # fmt: skip

    def _make(self) -> None:
        import torch

        from memcompile.dialect.cache_codes import code_dtype, code_width, quantize
        from memcompile.dialect.pages import page_bounds_definition

        rule, rng = self.rule, np.random.default_rng(SEED)

        def random(*shape: int) -> torch.Tensor:
            values: NDArray[np.float32] = rng.standard_normal(shape, np.float32)
            return torch.from_numpy(values)

        queries = 1 if rule.page_tokens else min(CHUNK_TOKENS, self.tokens)
        k, v = (random(1, rule.kv_heads, self.tokens, rule.width) for _ in range(2))
        k[:, :, ::HEAVY_EVERY] *= 3
        scale = torch.full((rule.kv_heads * rule.width,), 0.1) if rule.bits else None
        if rule.page_tokens:
            stored = 2 * code_width(rule.bits, rule.width)
            empty = torch.zeros(1, rule.kv_heads, 0, stored, dtype=code_dtype(rule.bits, k.dtype))
            self._tensors["bounds"] = page_bounds_definition(
                k, empty, torch.arange(self.tokens)[None], scale, page_tokens=rule.page_tokens, bits=rule.bits
            )
        else:
            self._tensors["pattern"] = torch.tensor(rule.pattern, dtype=torch.int32)
        if scale is not None:
            k, v = (quantize(x, scale, rule.bits) for x in (k, v))
        self._tensors |= {"q": random(1, rule.heads, queries, rule.width), "k": k, "v": v, "scale": scale}
