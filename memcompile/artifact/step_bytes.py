"""Where the bytes of a decode step go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that decoding one token of every row moves, at the end of a workload.

    weights: every stored tensor once; of experts those that are chosen, of an embedding the rows looked up.
    state: all caches, read once. activations: what linear layers and attention read and write.
    """

    weights: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.activations

    def as_dict(self) -> dict[str, int]:
        return {"weights": self.weights, "state": self.state, "activations": self.activations}

    def sentence(self) -> str:
        """What compressing one of them can win at most, where bytes bound the speed."""
        weights, state = self.weights / self.total, self.state / self.total
        return (
            f"weights are {weights:.0%} of the bytes of a decode step and the cache {state:.0%}: "
            f"KV compression can win at most {1 / (1 - state):.1f}x, "
            f"weight compression {1 / (1 - weights):.1f}x"
        )
