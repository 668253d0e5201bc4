"""A machine whose candidates take the time they are told to, on a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memcompile.tuning import Candidate, Parameter, Space

TWO = Space("toy", {"ours": (Parameter("tile", (0, 1, 2), 0), Parameter("chunk", (4, 8), 4)), "theirs": ()})
LARGE = Space("toy", {"ours": tuple(Parameter(name, tuple(range(8)), 0) for name in "abc")})

Cost = Callable[[Candidate], float]


@dataclass
class Machine:
    """`noise` slows every call that begins within a span of the clock."""

    cost: Cost
    noise: Mapping[tuple[float, float], float] = field(default_factory=dict)
    now: float = 0.0
    calls: list[Candidate] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def runner(self, candidate: Candidate) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(candidate)
            slower = next((f for (a, b), f in self.noise.items() if a <= self.now < b), 1.0)
            self.now += self.cost(candidate) * slower

        return run


def distance_to(**best: int) -> Cost:
    """A cost with one valley: the farther a parameter is from its best value, the slower."""
    return lambda candidate: 0.05 * (1 + sum(abs(candidate.get(name) - best[name]) for name in best))
