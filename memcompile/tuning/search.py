"""Find the fastest candidate of a space: all of them when they are few, else a seeded search.

A large space is sampled at random, then the neighbours of the best are tried until none of them is better.
Whoever leads in the end meets the default once more in a race of their own: the gain that is reported comes
from there, so that luck in the first race is not taken for speed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from memcompile.tuning.space import Candidate, Sizes, Space
from memcompile.tuning.timing import HOPELESS, Clock, Gain, Race, Run

EXHAUSTIVE: Final = 48
SAMPLE: Final = 16
ROUNDS: Final = 7
DUEL_ROUNDS: Final = 11
# fewer prove nothing, whatever the time
LEAST_DUEL_ROUNDS: Final = 3
DUELLISTS: Final = 3
# the part of the time that the first race may take
RACE_SHARE: Final = 0.7
# below this gain the default stays: two runs of the same code differ by as much
WORTH: Final = 1.02

# A candidate's run, or the reason why it must not be used.
Prepare = Callable[[Candidate], Run | str]


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, and how hard, to look. `seconds` counts from the start of the search."""

    seconds: float = 30.0
    rounds: int = ROUNDS
    exhaustive: int = EXHAUSTIVE
    sample: int = SAMPLE
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome: who won, by how much, everybody's seconds, and who was refused and why.

    `shares`: the least time over the default's in the same rounds; below 1 is faster.
    """

    winner: Candidate
    gain: Gain
    seconds: dict[Candidate, tuple[float, ...]]
    shares: dict[Candidate, float]
    refused: dict[Candidate, str]
    space_size: int
    # whether every valid candidate was tried
    exhaustive: bool


@dataclass(slots=True)
class Search:
    """One search of one space at one set of sizes."""

    space: Space
    sizes: Sizes
    prepare: Prepare
    settings: Settings = field(default_factory=Settings)
    work: Callable[[Candidate], float] = lambda candidate: 1.0
    clock: Clock = time.perf_counter
    update: Callable[[int, int], None] = lambda done, total: None
    refused: dict[Candidate, str] = field(default_factory=dict)

    def run(self) -> Found:
        """Search. Raises ValueError when the default itself cannot run."""
        begin = self.clock()
        race_ends = begin + self.settings.seconds * RACE_SHARE
        everyone = self.space.candidates(self.sizes)
        small = len(everyone) <= self.settings.exhaustive
        race = Race({}, self.work, clock=self.clock, seed=self.settings.seed)
        self._admit(race, everyone if small else self._sampled(everyone), race_ends)
        for done in range(self.settings.rounds):
            self.update(done, self.settings.rounds + DUEL_ROUNDS)
            race.run(1, race_ends)
        while not small and self.clock() < race_ends and self._climb(race, race_ends):
            race.run(self.settings.rounds, race_ends)
        duel = self._duel(race, begin + self.settings.seconds)
        winner = duel.ranking()[0]
        if not duel.gain(winner).worth(WORTH):
            winner = self.space.default
        tried = len(race.runs) + len(self.refused)
        times = {c: tuple(race.times[c].values()) + tuple(duel.times.get(c, {}).values()) for c in race.times}
        # all from the race that all ran in; only the winner's is from the duel, like its gain
        shares = {c: race.share(c) for c in race.times} | {winner: 1 / duel.gain(winner).safe}
        return Found(
            winner, duel.gain(winner), times, shares, self.refused, len(everyone), tried == len(everyone)
        )

    def _sampled(self, everyone: Sequence[Candidate]) -> list[Candidate]:
        chosen = random.Random(self.settings.seed).sample(everyone[1:], self.settings.sample)
        return [everyone[0], *chosen]

    def _admit(self, race: Race, candidates: Sequence[Candidate], deadline: float) -> int:
        """Prepare candidates that are new, and let those run that are right; how many those are.

        Candidates may have to be compiled: none but the default is prepared after the deadline.
        """
        admitted = 0
        for candidate in candidates:
            if candidate in race.runs or candidate in self.refused:
                continue
            if race.runs and self.clock() >= deadline:
                break
            run = self.prepare(candidate)
            if not isinstance(run, str):
                race.runs[candidate] = run
                admitted += 1
            elif candidate == self.space.default:
                raise ValueError(run)
            else:
                self.refused[candidate] = run
        return admitted

    def _climb(self, race: Race, deadline: float) -> bool:
        """Let the neighbours of the best join the race; whether there were new ones."""
        return self._admit(race, self.space.neighbours(race.ranking()[0], self.sizes), deadline) > 0

    def _duel(self, race: Race, deadline: float) -> Race:
        best = [c for c in race.ranking() if c != self.space.default]
        # the other implementations send their best, so that none is chosen without a duel
        sent = {c.implementation: c for c in reversed(best) if race.share(c) <= HOPELESS}
        runs = {c: race.runs[c] for c in (self.space.default, *best[:DUELLISTS], *sent.values())}
        duel = Race(runs, self.work, clock=self.clock, seed=self.settings.seed + 1)
        for done in range(DUEL_ROUNDS):
            self.update(self.settings.rounds + done, self.settings.rounds + DUEL_ROUNDS)
            duel.run(1, deadline, LEAST_DUEL_ROUNDS)
        self.update(1, 1)
        return duel
