"""Attention as it is tuned: the sizes of a region, the parts of a workload, and inputs to time them with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memcompile.tuning.space import Candidate, Parameter, Rule, Sizes, Space, always

PREFILL: Final = "attention.prefill"
DECODE: Final = "attention.decode"
KERNELS: Final = "kernels"
# parameters of csrc/attention.h; 0 lets the kernel choose
KEY_TILE: Final = Parameter("key_tile", (0, 16, 32, 64, 128), 0)
SPLITS: Final = Parameter("splits", (0, 1, 2, 4, 8, 16, 32), 0)
CHUNKS: Final = (256, 512, 1024)
SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What is weighed: prompts of so many tokens, then so many new ones, so many at once."""

    prompt_tokens: int
    new_tokens: int = 128
    batch: int = 1
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """One region's attention. `bits` 0: a float cache; `window` 0: every earlier token is seen.

    A softcap is not among the sizes: every implementation computes it for every score alike.
    """

    heads: int
    kv_heads: int
    width: int
    bits: int = 0
    window: int = 0
    sinks: int = 0
    block: int = 0
    stride: int = 0

    def __str__(self) -> str:
        parts = [f"{self.heads}/{self.kv_heads} heads of {self.width}"]
        parts += [f"int{self.bits} cache"] if self.bits else []
        parts += [f"window {self.window}"] if self.window else []
        return ", ".join(parts)

    def held(self, position: int) -> NDArray[np.int64]:
        """The positions before `position` that a query there, or later, can still see."""
        earlier = np.arange(position, dtype=np.int64)
        if not self.window:
            return earlier
        seen = (position - earlier < self.window) | (earlier < self.sinks)
        if self.stride:
            seen |= (earlier // self.block) % self.stride == 0
        return earlier[seen]


@dataclass(frozen=True)
class Problem:
    """A part of a workload in one region.

    Prefill: a prompt of `tokens`, timed by the chunk in its middle: cost grows with the keys before a chunk,
    so that is the mean chunk. Decode: one token of each of `batch` rows, over a cache of `tokens`.
    """

    operator: str
    shape: Shape
    tokens: int
    batch: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {**asdict(self.shape), "tokens": self.tokens, "batch": self.batch}

    @classmethod
    def from_sizes(cls, operator: str, sizes: Sizes) -> Problem:
        """The problem that has these sizes."""
        rest = {name: value for name, value in sizes.items() if name not in ("tokens", "batch")}
        return cls(operator, Shape(**rest), sizes["tokens"], sizes["batch"])

    def __str__(self) -> str:
        rows = f", {self.batch} rows" if self.batch > 1 else ""
        return f"{self.operator.partition('.')[2]} {self.tokens:,}: {self.shape}{rows}"

    def repeats(self, candidate: Candidate) -> int:
        """Calls of one run: as many tokens for every chunk.

        On a busy machine a call longer than the scheduler's time slice is always interrupted, a shorter one
        is not: calls of different length could not be compared.
        """
        if self.operator != PREFILL:
            return 1
        return max(1, min(max(CHUNKS), self.tokens) // self.chunk(candidate))

    def runs(self, candidate: Candidate) -> float:
        """Runs that the whole prompt takes, or 1."""
        if self.operator != PREFILL:
            return 1.0
        return self.tokens / (self.chunk(candidate) * self.repeats(candidate))

    def chunk(self, candidate: Candidate) -> int:
        """Query tokens of one call."""
        return min(candidate.get("chunk", self.tokens), self.tokens) if self.operator == PREFILL else 1

    def inputs(self, chunk: int) -> Inputs:
        """Inputs of one call: the chunk in the middle of the prompt, or the token after the cache."""
        first = self.tokens // 2 - chunk // 2 if self.operator == PREFILL else self.tokens
        past = self.shape.held(first)
        positions = np.concatenate([past, np.arange(first, first + chunk, dtype=np.int64)])
        table = self._table
        q = table.q[first : first + chunk] if self.operator == PREFILL else table.q[:1]
        keys, values = (x[:, positions][None].repeat(self.batch, 0) for x in (table.k, table.v))
        return Inputs(q[None].repeat(self.batch, 0), keys, values, table.scale, positions, len(past))

    @cached_property
    def _table(self) -> _Table:
        # rows by position, so that chunks of every size see the same keys
        rng, shape = np.random.default_rng(SEED), self.shape
        rows = self.tokens + 1
        q = rng.standard_normal((rows, shape.heads, shape.width), np.float32)
        sizes = (shape.kv_heads, rows, shape.width)
        if not shape.bits:
            k, v = (rng.standard_normal(sizes, np.float32) for _ in range(2))
            return _Table(q, k, v, None)
        top = 2 ** (shape.bits - 1) - 1
        k, v = (rng.integers(-top, top + 1, sizes, np.int8) for _ in range(2))
        scale = (0.5 + rng.random(shape.kv_heads * shape.width, np.float32)) / top
        return _Table(q, k, v, scale)


@dataclass(frozen=True, slots=True)
class _Table:
    q: NDArray[np.float32]
    k: NDArray[Any]
    v: NDArray[Any]
    scale: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """q [B,T,H,D] float32; k, v [B,G,S,D] float32, or codes one a byte, with `scale` [G*D]; positions [S].

    The last T keys are those of the queries; the `past` before them are in the cache.
    """

    q: NDArray[np.float32]
    k: NDArray[Any]
    v: NDArray[Any]
    scale: NDArray[np.float32] | None
    positions: NDArray[np.int64]
    past: int

    def new(self, keys: NDArray[Any]) -> NDArray[np.float32]:
        """The queries' own keys (or values) [B,T,G,D] as numbers, not as codes."""
        rows = keys[:, :, self.past :].astype(np.float32)
        if self.scale is not None:
            rows = rows * self.scale.reshape(1, keys.shape[1], 1, keys.shape[3])
        return np.ascontiguousarray(rows.transpose(0, 2, 1, 3))


def problems(shape: Shape, workload: Workload, held_tokens: int | None = None) -> tuple[Problem, Problem]:
    """Prefill and decode of a region. `held_tokens`: what of the prompt the cache keeps, when not all."""
    return (
        # prompts are fed one row at a time
        Problem(PREFILL, shape, workload.prompt_tokens),
        Problem(DECODE, shape, held_tokens or workload.prompt_tokens, workload.batch),
    )


def space_of(operator: str, rival: str, chunk: Parameter | None = None, valid: Rule = always) -> Space:
    """Our kernels against the runtime's implementation, `rival`; with `chunk`, prompts come in parts."""
    if operator == DECODE:
        return Space(operator, {KERNELS: (SPLITS,), rival: ()}, valid)
    if chunk is None:
        return Space(operator, {KERNELS: (KEY_TILE,), rival: ()}, valid)
    usual = chunk.default

    def fits(candidate: Candidate, sizes: Sizes) -> bool:
        # chunks longer than the prompt are all the same
        return (candidate.get("chunk") == usual or candidate.get("chunk") <= sizes["tokens"]) and valid(
            candidate, sizes
        )

    return Space(operator, {KERNELS: (KEY_TILE, chunk), rival: (chunk,)}, fits)
