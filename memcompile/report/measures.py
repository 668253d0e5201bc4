"""The rows of every comparison: which metric, what it is called, how it prints, and which way is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from memcompile.evaluate.units import (
    format_bytes,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)


@dataclass(frozen=True, slots=True)
class Measure:
    """One row. `lower_is_better` None: neither. `has_ratio`: a quotient of two models means something."""

    name: str
    title: str
    show: Callable[[float], str]
    lower_is_better: bool | None = True
    has_ratio: bool = True

    def show_ratio(self, ratio: float) -> str:
        """Return the quotient as text; perplexity as a change, for its quotient is always close to one."""
        return f"{(ratio - 1) * 100:+.2f}%" if self.name == "perplexity" else format_ratio(ratio)

    def verdict(self, ratio: float) -> str:
        """Return "better", "worse" or "same": within one percent nothing is claimed."""
        if self.lower_is_better is None or abs(ratio - 1) < 0.01:
            return "same"
        return "better" if (ratio < 1) == self.lower_is_better else "worse"


def _logprob(value: float) -> str:
    return f"{value:.3f}"


MEASURES: Final = (
    Measure("perplexity", "perplexity", format_number),
    Measure("kl", "KL to original, nats", format_number, has_ratio=False),
    Measure("kl_p99", "KL, 99th percentile", format_number, has_ratio=False),
    Measure("top1_agreement", "same top token", format_percent, False, has_ratio=False),
    Measure("output_difference", "largest output difference", format_number, has_ratio=False),
    Measure("passkey_accuracy", "passkeys found", format_percent, False, has_ratio=False),
    Measure("passkey_logprob", "passkey log-prob.", _logprob, False, has_ratio=False),
    Measure("prefill_seconds", "time to first token", format_seconds),
    Measure("decode_seconds_per_token", "time per token", format_seconds),
    Measure("state_bytes", "state after prompt", format_bytes),
    Measure("state_bytes_peak", "state at most", format_bytes),
    Measure("peak_memory_bytes", "peak memory", format_bytes),
    Measure("load_seconds", "time to load", format_seconds),
)
