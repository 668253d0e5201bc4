"""One line of the tuning database: what was asked, on what, and what every candidate took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memcompile.tuning.search import Found
from memcompile.tuning.space import Candidate
from memcompile.tuning.timing import Gain


@dataclass(frozen=True)
class Key:
    """Everything that a result depends on; another value of any of it is another measurement."""

    backend: str
    operator: str
    sizes: Mapping[str, int]
    dtype: str
    device: Mapping[str, str | int]
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "operator": self.operator,
            "sizes": dict(self.sizes),
            "dtype": self.dtype,
            "device": dict(self.device),
            "versions": dict(self.versions),
        }

    @property
    def digest(self) -> str:
        """The key's name in the database."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """The outcome of one search.

    `seconds` holds each candidate's time in each round it ran in. Rounds met different loads, so candidates
    are compared by `shares`: the least time over the default's in the same rounds.
    """

    key: Key
    default: Candidate
    winner: Candidate
    gain: Gain
    seconds: Mapping[Candidate, tuple[float, ...]]
    shares: Mapping[Candidate, float]
    refused: Mapping[Candidate, str]
    space_size: int
    exhaustive: bool
    when: str

    @classmethod
    def of(cls, key: Key, default: Candidate, found: Found, when: str) -> Record:
        return cls(
            key, default, found.winner, found.gain, found.seconds, found.shares, found.refused,
            found.space_size, found.exhaustive, when,
        )  # fmt: skip

    def estimate(self, candidate: Candidate) -> float:
        """Seconds of a candidate: its share of the default's least time."""
        return min(self.seconds[self.default]) * self.shares[candidate]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.key.as_dict(),
            "default": self.default.as_dict(),
            "winner": self.winner.as_dict(),
            "gain": self.gain.as_dict(),
            "candidates": [
                {**c.as_dict(), "share": round(self.shares[c], 4), "seconds": [round(s, 9) for s in seconds]}
                for c, seconds in self.seconds.items()
            ],
            "refused": [{**c.as_dict(), "reason": reason} for c, reason in self.refused.items()],
            "space_size": self.space_size,
            "exhaustive": self.exhaustive,
            "when": self.when,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Record:
        """A record as `as_dict` wrote it. Raises KeyError, TypeError and ValueError for anything else."""
        key = Key(*(found[name] for name in ("backend", "operator", "sizes", "dtype", "device", "versions")))
        gain = Gain(*(float(found["gain"][name]) for name in ("best", "median", "low", "high")))
        seconds = {Candidate.from_dict(c): tuple(float(s) for s in c["seconds"]) for c in found["candidates"]}
        shares = {Candidate.from_dict(c): float(c["share"]) for c in found["candidates"]}
        default, winner = Candidate.from_dict(found["default"]), Candidate.from_dict(found["winner"])
        if not all(seconds.get(c) for c in (default, winner)):
            raise ValueError("the default and the winner have no times")
        refused = {Candidate.from_dict(c): str(c["reason"]) for c in found["refused"]}
        size, exhaustive = int(found["space_size"]), bool(found["exhaustive"])
        return cls(key, default, winner, gain, seconds, shares, refused, size, exhaustive, str(found["when"]))
