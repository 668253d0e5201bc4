"""Attribute the bytes of a decode step, and the time it took, to weights, state and activations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from memcompile.artifact import Manifest, StepBytes
from memcompile.evaluate.metrics import Metrics


@dataclass(frozen=True, slots=True)
class StepCost:
    """A decode step of one model: the bytes that were predicted for it, and the seconds that were measured.

    Time is shared out by bytes: what each part would take if memory alone set the speed.
    """

    moved: StepBytes
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """What the step reached: near the machine's limit memory bounds it, far below it something else."""
        return self.moved.total / self.seconds

    def as_dict(self) -> dict[str, Any]:
        parts = self.moved.as_dict()
        return {
            "bytes": parts,
            "seconds": {part: self.seconds * size / self.moved.total for part, size in parts.items()},
            "bytes_per_second": self.bytes_per_second,
        }


@dataclass(frozen=True, slots=True)
class Attribution:
    """The steps of the rewritten model and, where it was measured, the original."""

    original: StepCost | None
    rewritten: StepCost

    @property
    def predicted_speedup(self) -> float | None:
        """Of a token, if bytes alone decided."""
        return self.original.moved.total / self.rewritten.moved.total if self.original else None

    @property
    def measured_speedup(self) -> float | None:
        return self.original.seconds / self.rewritten.seconds if self.original else None

    def as_dict(self) -> dict[str, Any]:
        """The attribution as JSON; `bound`: what could be won, of the original where there is one."""
        return {
            "bound": (self.original or self.rewritten).moved.sentence(),
            "original": self.original.as_dict() if self.original else None,
            "rewritten": self.rewritten.as_dict(),
            "predicted_speedup": self.predicted_speedup,
            "measured_speedup": self.measured_speedup,
        }


def attribute(manifests: dict[str, Manifest], measured: dict[str, Metrics]) -> Attribution | None:
    """Put predicted bytes and measured time together, by role.

    None where decoding was not timed, or the rewritten artifact says nothing of its bytes: it does not
    generate, or is older than that entry.
    """
    costs = {role: _step_cost(manifest, measured[role]) for role, manifest in manifests.items()}
    rewritten = costs["rewritten"]
    return None if rewritten is None else Attribution(costs.get("original"), rewritten)


def _step_cost(manifest: Manifest, metrics: Metrics) -> StepCost | None:
    moved, seconds = manifest.step_bytes, metrics.decode_seconds_per_token
    if moved is None or not seconds:
        return None
    # the manifest's is for the plan's workload, and this evaluation's prompt may have another length
    if metrics.state_bytes_predicted is not None:
        moved = dataclasses.replace(moved, state=metrics.state_bytes_predicted)
    return StepCost(moved, seconds)
