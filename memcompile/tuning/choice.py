"""From measurements to a choice: one implementation for each region, and one chunk for the whole model.

A region runs prefill and decode by the same operator, so its implementations are compared on the whole
workload: a prompt, then its new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from memcompile.tuning.attention import KERNELS, Problem, Shape, Workload, problems
from memcompile.tuning.database import Database
from memcompile.tuning.machine import fingerprint, versions
from memcompile.tuning.records import Record
from memcompile.tuning.space import Candidate

# a record of another length counts as long as it is within this factor
NEAR: Final = 2.0
# implementations are compared by sums over two searches: one that won in neither has to stay out, and the
# gain has to be more than noise
IMPLEMENTATION_WORTH: Final = 1.05
# chunks also decide how the rest of the model runs, which is not timed: attention has to gain this much
CHUNK_WORTH: Final = 1.10


@dataclass(frozen=True, slots=True)
class Ask:
    """A region to choose for; `held_tokens`: what of the prompt its cache keeps, when not all."""

    region: str
    shape: Shape
    held_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a region runs on. `gain` is over the default on the whole workload; None: it was not tuned."""

    implementation: str = KERNELS
    key_tile: int = 0
    splits: int = 0
    gain: float | None = None

    def __str__(self) -> str:
        values = {"key_tile": self.key_tile, "splits": self.splits}
        if self.implementation != KERNELS:
            return self.implementation
        return " ".join([KERNELS, *(f"{name}={value}" for name, value in values.items() if value)])


@dataclass(frozen=True)
class Choices:
    """The chunk of prompts, and each region's choice."""

    chunk: int
    regions: Mapping[str, Choice]
    decisions: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Measured:
    """A region's two records, as seconds of the workload."""

    ask: Ask
    prefill: Record
    decode: Record
    workload: Workload

    def prompt_seconds(self, candidate: Candidate) -> float:
        # a record of another length: attention over a prompt grows with its square
        scale = (self.workload.prompt_tokens / self.prefill.key.sizes["tokens"]) ** 2
        return self.prefill.estimate(candidate) * scale * self.workload.batch

    def decode_seconds(self, candidate: Candidate) -> float:
        held = self.ask.held_tokens or self.workload.prompt_tokens
        return (
            self.decode.estimate(candidate)
            * held
            / self.decode.key.sizes["tokens"]
            * self.workload.new_tokens
        )

    def best(self, chunk: int) -> tuple[float, Candidate, Candidate]:
        """Seconds, and the candidates for prefill and decode, of the best implementation at a chunk."""
        default = self.prefill.default.implementation
        at_chunk = [c for c in self.prefill.seconds if c.get("chunk") == chunk]
        sums = {}
        for name in dict.fromkeys(c.implementation for c in at_chunk):
            prompts = [c for c in at_chunk if c.implementation == name]
            steps = [c for c in self.decode.seconds if c.implementation == name]
            if steps:
                prefill, decode = _of(self.prefill, prompts), _of(self.decode, steps)
                sums[name] = (self.prompt_seconds(prefill) + self.decode_seconds(decode), prefill, decode)
        best = min(sums, key=lambda name: sums[name][0])
        proven = best in (self.prefill.winner.implementation, self.decode.winner.implementation)
        if default in sums and not (proven and sums[default][0] >= IMPLEMENTATION_WORTH * sums[best][0]):
            return sums[default]
        return sums[best]

    def default_seconds(self) -> float:
        return self.prompt_seconds(self.prefill.default) + self.decode_seconds(self.decode.default)

    def chunks(self) -> set[int]:
        return {c.get("chunk") for c in self.prefill.seconds}

    def best_chunk(self) -> int:
        return self.prefill.winner.get("chunk")


def _of(record: Record, candidates: Sequence[Candidate]) -> Candidate:
    """Of one implementation's candidates the record's winner, else automatic parameters, else the fastest."""
    if record.winner in candidates:
        return record.winner
    automatic = [c for c in candidates if all(not v for n, v in c.parameters if n != "chunk")]
    return next(iter(automatic), min(candidates, key=record.estimate))


def choose(
    database: Database,
    backend: str,
    asks: Sequence[Ask],
    workload: Workload,
    *,
    dtype: str,
    packages: Sequence[str],
    chunk: int,
) -> Choices:
    """Choose by what was tuned on this machine with these versions.

    A region of whose prefill or decode nothing is known keeps the default: our kernels, parameters
    automatic. `chunk` is the default chunk. Raises MC122.
    """
    plain = {ask.region: Choice() for ask in asks}
    stored = database.records().values()
    if not stored:
        return Choices(chunk, plain)
    context = {
        "backend": backend,
        "dtype": dtype,
        "device": fingerprint(workload.threads),
        "versions": versions(packages),
    }
    here = [r for r in stored if context.items() <= r.key.as_dict().items()]
    measured = [m for ask in asks if (m := _measured(here, ask, workload)) is not None]
    if not measured:
        return Choices(chunk, plain)
    best = _chunk(measured, len(asks), chunk)
    choices = plain | {m.ask.region: _choice(m, best, chunk) for m in measured}
    return Choices(best, choices, tuple(_decisions(measured, choices, best, chunk)))


def _measured(records: Sequence[Record], ask: Ask, workload: Workload) -> Measured | None:
    found = [_nearest(records, problem) for problem in problems(ask.shape, workload, ask.held_tokens)]
    prefill, decode = found
    return None if prefill is None or decode is None else Measured(ask, prefill, decode, workload)


def _nearest(records: Sequence[Record], problem: Problem) -> Record | None:
    def distance(record: Record) -> float:
        return abs(math.log(record.key.sizes["tokens"] / problem.tokens))

    wanted = problem.sizes | {"tokens": 0}
    same = [
        record
        for record in records
        if record.key.operator == problem.operator and {**record.key.sizes, "tokens": 0} == wanted
    ]
    near = [record for record in same if distance(record) <= math.log(NEAR)]
    return min(near, key=distance, default=None)


def _chunk(measured: Sequence[Measured], regions: int, default: int) -> int:
    """The chunk with the least time over all regions, among the default and those that won a race."""
    shared = set.intersection(*(m.chunks() for m in measured))
    if len(measured) < regions or default not in shared:
        return default
    won = {default, *(m.best_chunk() for m in measured)} & shared
    totals = {chunk: sum(m.best(chunk)[0] for m in measured) for chunk in won}
    best = min(totals, key=lambda chunk: totals[chunk])
    return best if totals[default] >= CHUNK_WORTH * totals[best] else default


def _choice(measured: Measured, chunk: int, default: int) -> Choice:
    if chunk not in measured.chunks():
        return Choice()
    seconds, prefill, decode = measured.best(chunk)
    gain = measured.default_seconds() / seconds
    return Choice(prefill.implementation, prefill.get("key_tile"), decode.get("splits"), gain)


def _decisions(
    measured: Sequence[Measured], choices: Mapping[str, Choice], chunk: int, default: int
) -> list[dict[str, Any]]:
    """What was chosen, regions that are alike together, as the manifest keeps it."""
    alike: dict[tuple[Shape, Choice], list[str]] = {}
    for m in measured:
        alike.setdefault((m.ask.shape, choices[m.ask.region]), []).append(m.ask.region)
    found: list[dict[str, Any]] = [
        {"tuned": "attention", "regions": ", ".join(regions), "decision": _sentence(choice)}
        for (_, choice), regions in alike.items()
    ]
    if chunk != default:
        found.append({"tuned": "prefill", "decision": f"chunks of {chunk} tokens in place of {default}"})
    return found


def _sentence(choice: Choice) -> str:
    if choice.gain is None or str(choice) == str(Choice()):
        return f"{choice}: the default was not beaten"
    return f"{choice}, {choice.gain:.2f}x as fast as the default over the workload"
