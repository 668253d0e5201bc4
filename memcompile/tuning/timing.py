"""Time candidates fairly on a machine that is not quiet.

They take turns in rounds, so that whatever else the machine does meets all of them alike; the default runs in
every round, so that a gain is a ratio of two times that were taken next to each other.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from memcompile.tuning.space import Candidate

Clock = Callable[[], float]
# does the work once; gives the seconds it took where this process's clock would also count the way there
Run = Callable[[], float | None]

# a turn lasts about so long: several calls of a fast candidate, one of a slow one
TURN_SECONDS: Final = 0.03
# two calls, so that one of them is not the first after somebody else's; a long one is not worth it
LEAST_CALLS: Final = 2
LONG_SECONDS: Final = 0.15
MOST_CALLS: Final = 200
# a candidate so much slower than the best after the first rounds is not called again
HOPELESS: Final = 1.4
FIRST_ROUNDS: Final = 3
# one that is so much slower is not called a second time
ABSURD: Final = 3.0


@dataclass(frozen=True, slots=True)
class Gain:
    """How much faster than the default: the default's least time over the candidate's, in shared rounds.

    `median`, `low` and `high` are the median and the quartiles of the rounds' own ratios: the spread.
    """

    best: float
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, default: Mapping[int, float], other: Mapping[int, float]) -> Gain:
        """From the times of rounds, by round."""
        shared = sorted(default.keys() & other.keys())
        ratios = [default[index] / other[index] for index in shared]
        best = min(default[index] for index in shared) / min(other[index] for index in shared)
        low, median, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
        )
        return cls(best, median, low, high)

    def worth(self, factor: float) -> bool:
        """Whether the least times, the median and three quarters of the rounds agree that it is faster."""
        return self.safe >= factor and self.low >= 1.0

    @property
    def safe(self) -> float:
        """The smaller of the two estimates: what is claimed."""
        return min(self.best, self.median)

    def as_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 4) for name in ("best", "median", "low", "high")}


@dataclass(slots=True)
class Race:
    """Candidates and the seconds each took, by round. The first candidate is the default."""

    runs: dict[Candidate, Run]
    # how many runs of a candidate do the whole work: seconds are counted for all of them
    work: Callable[[Candidate], float] = lambda candidate: 1.0
    clock: Clock = time.perf_counter
    seed: int = 0
    times: dict[Candidate, dict[int, float]] = field(default_factory=dict)
    rounds: int = 0

    @property
    def default(self) -> Candidate:
        return next(iter(self.runs))

    def run(self, rounds: int, deadline: float, least: int = 1) -> None:
        """Go on for so many rounds, or until the clock passes `deadline` after the `least` of all rounds."""
        shuffled = random.Random(f"{self.seed} {self.rounds}")
        for _ in range(rounds):
            if self.rounds >= least and self.clock() >= deadline:
                return
            order = self._field()
            # no candidate always runs after the same other
            shuffled.shuffle(order)
            for candidate in order:
                seconds = self._turn(self.runs[candidate]) * self.work(candidate)
                self.times.setdefault(candidate, {})[self.rounds] = seconds
            self.rounds += 1

    def seconds(self, candidate: Candidate) -> float:
        """The least time of any round."""
        return min(self.times[candidate].values())

    def share(self, candidate: Candidate) -> float:
        """Its least time over the default's, in the rounds that both ran in: below 1 is faster."""
        mine, default = self.times[candidate], self.times[self.default]
        return min(mine.values()) / min(default[index] for index in mine)

    def ranking(self) -> list[Candidate]:
        """Candidates that were timed, the fastest first."""
        return sorted(self.times, key=self.share)

    def gain(self, candidate: Candidate) -> Gain:
        """Against the default, in the rounds that both ran in."""
        return Gain.of(self.times[self.default], self.times[candidate])

    def _field(self) -> list[Candidate]:
        best = min((self.share(c) for c in self.times), default=1.0)
        return [c for c in self.runs if c == self.default or self._hopeful(c, best)]

    def _hopeful(self, candidate: Candidate, best: float) -> bool:
        timed = len(self.times.get(candidate, ()))
        factor = ABSURD if timed < FIRST_ROUNDS else HOPELESS
        return not timed or self.share(candidate) <= factor * best

    def _turn(self, run: Run) -> float:
        started = self.clock()
        least, calls = float("inf"), 0
        while calls < MOST_CALLS:
            before = self.clock()
            told = run()
            after = self.clock()
            least, calls = min(least, after - before if told is None else told), calls + 1
            enough = after - before >= LONG_SECONDS or calls >= LEAST_CALLS
            if enough and after - started >= TURN_SECONDS:
                break
        return least
