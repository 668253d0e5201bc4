"""What may be tried: the implementations of an operator, and the parameters of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that an implementation takes, and the values worth trying; the default is one of them."""

    name: str
    choices: tuple[int, ...]
    default: int

    def __post_init__(self) -> None:
        if self.default not in self.choices:
            raise ValueError(f"{self.name}: the default {self.default} is not among {self.choices}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation with a value for each of its parameters, in the space's order."""

    implementation: str
    parameters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join((self.implementation, *(f"{name}={value}" for name, value in self.parameters)))

    def get(self, name: str, default: int = 0) -> int:
        """The value of a parameter; `default` when the implementation does not have it."""
        return dict(self.parameters).get(name, default)

    def as_dict(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Candidate:
        """A candidate as `as_dict` wrote it. Raises KeyError, TypeError and ValueError for anything else."""
        parameters = tuple((str(name), int(value)) for name, value in dict(found["parameters"]).items())
        return cls(str(found["implementation"]), parameters)


Rule = Callable[[Candidate, Sizes], bool]


def always(candidate: Candidate, sizes: Sizes) -> bool:
    """The rule of a space in which every candidate can run."""
    del candidate, sizes
    return True


@dataclass(frozen=True)
class Space:
    """All candidates of an operator. `valid` says which of them can run at given sizes.

    The default is the first implementation with the default of each parameter. It is what runs when nothing
    was tuned, so it has to be valid at every size.
    """

    operator: str
    implementations: Mapping[str, tuple[Parameter, ...]]
    valid: Rule = always

    @property
    def default(self) -> Candidate:
        name, parameters = next(iter(self.implementations.items()))
        return Candidate(name, tuple((p.name, p.default) for p in parameters))

    def candidates(self, sizes: Sizes) -> tuple[Candidate, ...]:
        """Every valid candidate, the default first."""
        found = (c for name in self.implementations for c in self._of(name))
        rest = (c for c in found if c != self.default and self.valid(c, sizes))
        return (self.default, *rest)

    def neighbours(self, candidate: Candidate, sizes: Sizes) -> tuple[Candidate, ...]:
        """Valid candidates one step away: one parameter at the next choice up or down."""
        return tuple(c for c in self._steps(candidate) if c == self.default or self.valid(c, sizes))

    def _of(self, name: str) -> Iterable[Candidate]:
        parameters = self.implementations[name]
        for values in itertools.product(*(p.choices for p in parameters)):
            yield Candidate(name, tuple(zip((p.name for p in parameters), values, strict=True)))

    def _steps(self, candidate: Candidate) -> Iterable[Candidate]:
        values = dict(candidate.parameters)
        for parameter in self.implementations[candidate.implementation]:
            at = parameter.choices.index(values[parameter.name])
            for place in (at - 1, at + 1):
                if 0 <= place < len(parameter.choices):
                    changed = values | {parameter.name: parameter.choices[place]}
                    yield Candidate(candidate.implementation, tuple(changed.items()))
