"""The numbers of one model, under the names that the reports use."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from memcompile.evaluate import scoring

METRIC_NAMES: Final = (
    "perplexity",
    "kl",
    "passkey_accuracy",
    "passkey_logprob",
    "prefill_seconds",
    "decode_seconds_per_token",
    "peak_memory_bytes",
    "state_bytes",
)
"""The metrics that other tools rely on: always present, null when not measured."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Everything measured on one model; None means not measured, and docs/concepts/evaluation.md says how."""

    prompt_tokens: int
    perplexity: float | None = None
    kl: float | None = None
    passkey_accuracy: float | None = None
    passkey_logprob: float | None = None
    prefill_seconds: float | None = None
    decode_seconds_per_token: float | None = None
    peak_memory_bytes: int | None = None
    state_bytes: int | None = None
    state_bytes_peak: int | None = None
    state_bytes_predicted: int | None = None
    load_seconds: float | None = None
    load_memory_bytes: int | None = None
    prefill_seconds_min: float | None = None
    prefill_seconds_max: float | None = None
    compress_seconds: float | None = None
    decode_seconds_min: float | None = None
    decode_seconds_p10: float | None = None
    decode_seconds_p90: float | None = None
    nll_sum: float | None = None
    nll_stderr: float | None = None
    scored_tokens: int = 0
    windows: int = 0
    kl_p99: float | None = None
    top1_agreement: float | None = None
    output_difference: float | None = None
    passkey: tuple[dict[str, Any], ...] = ()
    lengths: tuple[dict[str, float], ...] = ()
    token_losses: tuple[float, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The metrics as JSON: the named ones first, then the details; what is not finite is null."""
        values: dict[str, Any] = {name: _finite(getattr(self, name)) for name in METRIC_NAMES}
        for name in self.__dataclass_fields__:
            if name not in values and name not in ("passkey", "lengths", "token_losses"):
                values[name] = _finite(getattr(self, name))
        values["passkey"] = [dict(point) for point in self.passkey]
        values["lengths"] = [dict(point) for point in self.lengths]
        values["token_losses"] = list(self.token_losses)
        return values


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def cost_metrics(cost: dict[str, Any], other_prefills: list[float]) -> dict[str, Any]:
    """Summarise a cost task: medians and spreads, with prefills of the same length that other tasks timed."""
    prefills = [*cost["prefill_seconds"], *other_prefills]
    values: dict[str, Any] = {
        "prompt_tokens": cost["prompt_tokens"],
        "prefill_seconds": float(np.median(prefills)),
        "prefill_seconds_min": min(prefills),
        "prefill_seconds_max": max(prefills),
        "peak_memory_bytes": cost["peak_memory_bytes"],
        "load_seconds": cost["load_seconds"],
        "load_memory_bytes": cost["load_memory_bytes"],
    }
    if "state_bytes" in cost:
        values |= {name: cost[name] for name in ("state_bytes", "state_bytes_peak")}
        values["compress_seconds"] = float(np.median(cost["compress_seconds"]))
    if decodes := cost.get("decode_seconds"):
        values |= {
            "decode_seconds_per_token": float(np.median(decodes)),
            "decode_seconds_min": min(decodes),
            "decode_seconds_p10": float(np.percentile(decodes, 10)),
            "decode_seconds_p90": float(np.percentile(decodes, 90)),
        }
    if "output_difference" in cost:
        values["output_difference"] = cost["output_difference"]
    return values


def perplexity_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Summarise a perplexity task."""
    losses = np.asarray(result["losses"], dtype=np.float64)
    summary = scoring.summarise(losses)
    values: dict[str, Any] = {
        "perplexity": summary.perplexity,
        "nll_sum": summary.nll_sum,
        "nll_stderr": summary.nll_stderr,
        "scored_tokens": summary.count,
        "windows": result["windows"],
        "token_losses": tuple(result["losses"]),
    }
    if result.get("kl"):
        divergences = np.asarray(result["kl"], dtype=np.float64)
        values["kl"] = float(divergences.mean())
        values["kl_p99"] = float(np.percentile(divergences, 99))
        values["top1_agreement"] = result["agreed"] / summary.count
    return values


def passkey_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Summarise a passkey task; nothing when the prompt had no room for one."""
    points = result["points"]
    if not points:
        return {}
    return {
        "passkey_accuracy": sum(point["correct"] for point in points) / len(points),
        "passkey_logprob": sum(point["logprob"] for point in points) / len(points),
        "passkey": tuple(points),
    }
