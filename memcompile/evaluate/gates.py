"""Gates: limits that the measured metrics must keep to, or the artifact is not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from memcompile.errors import MemcompileError
from memcompile.evaluate.evaluation import Evaluation
from memcompile.evaluate.metrics import Metrics
from memcompile.evaluate.units import format_bytes, format_number, format_percent, format_ratio


@dataclass(frozen=True, slots=True)
class GateResult:
    """One limit of one gate: `got` is None when the metric was not measured, and that never passes."""

    name: str
    limit: str
    wanted: float
    got: float | None
    passed: bool

    @property
    def wanted_text(self) -> str:
        """The limit in words: "increase at most 2%"."""
        rule = RULES[self.name, self.limit]
        return f"{rule.relation} {rule.show(self.wanted)}"

    @property
    def got_text(self) -> str:
        """The measured value in words."""
        return "not measured" if self.got is None else RULES[self.name, self.limit].show(self.got)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON: numbers first, then the same in words."""
        return {
            "name": self.name,
            "wanted": self.wanted,
            "got": self.got,
            "passed": self.passed,
            "limit": self.limit,
            "wanted_text": self.wanted_text,
            "got_text": self.got_text,
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """How a limit reads its value from an evaluation, and how it compares and prints."""

    value: Callable[[Evaluation], float | None]
    at_least: bool
    show: Callable[[float], str]
    noun: str = ""

    @property
    def relation(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.noun} {bound}".strip()

    def holds(self, got: float, wanted: float) -> bool:
        return got >= wanted if self.at_least else got <= wanted


def _of_rewritten(name: str) -> Callable[[Evaluation], float | None]:
    def value(evaluation: Evaluation) -> float | None:
        found: float | None = getattr(evaluation.rewritten, name)
        return found

    return value


def _against_original(
    name: str, combine: Callable[[float, float], float]
) -> Callable[[Evaluation], float | None]:
    def value(evaluation: Evaluation) -> float | None:
        if evaluation.original is None:
            return None
        before, after = _pair(evaluation.original, evaluation.rewritten, name)
        return combine(before, after) if before and after else None

    return value


def _pair(original: Metrics, rewritten: Metrics, name: str) -> tuple[float | None, float | None]:
    return getattr(original, name), getattr(rewritten, name)


def _increase(before: float, after: float) -> float:
    return after / before - 1


def _speedup(before: float, after: float) -> float:
    return before / after


RULES: Final[dict[tuple[str, str], Rule]] = {
    ("perplexity", "max_increase"): Rule(
        _against_original("perplexity", _increase), False, format_percent, "increase"
    ),
    ("perplexity", "max"): Rule(_of_rewritten("perplexity"), False, format_number),
    ("kl", "max"): Rule(_of_rewritten("kl"), False, format_number, "nats"),
    ("passkey", "min_accuracy"): Rule(_of_rewritten("passkey_accuracy"), True, format_percent, "accuracy"),
    ("state_bytes", "max"): Rule(_of_rewritten("state_bytes"), False, format_bytes),
    ("peak_memory", "max"): Rule(_of_rewritten("peak_memory_bytes"), False, format_bytes),
    ("prefill_speedup", "min"): Rule(_against_original("prefill_seconds", _speedup), True, format_ratio),
    ("decode_speedup", "min"): Rule(
        _against_original("decode_seconds_per_token", _speedup), True, format_ratio
    ),
}
"""Every limit a plan may set, by gate and key."""


def check(gates: Any, evaluation: Evaluation) -> list[GateResult]:
    """Check every limit, in the order given.

    `gates` is the plan's gates section (anything with `limits()`), or a mapping of gate to key to limit.
    Raises MC113 for a limit that is not in RULES. A value that is missing or not a number does not pass.
    """
    results = []
    for name, limit, wanted in _limits(gates):
        rule = RULES.get((name, limit))
        if rule is None:
            known = ", ".join(f"{gate}.{key}" for gate, key in RULES)
            raise MemcompileError(
                "MC113", f"there is no gate {name}.{limit}", where="gates", fix=f"use one of {known}"
            )
        value = rule.value(evaluation)
        got = None if value is None or not math.isfinite(value) else float(value)
        passed = got is not None and rule.holds(got, wanted)
        results.append(GateResult(name, limit, wanted, got, passed))
    return results


def _limits(gates: Any) -> Iterator[tuple[str, str, float]]:
    if isinstance(gates, Mapping):
        for name, limits in gates.items():
            for limit, wanted in (limits or {}).items():
                if wanted is not None:
                    yield name, limit, float(wanted)
    elif gates is not None:
        for limit in gates.limits():
            yield limit.gate, limit.key, float(limit.value)


def raise_for_gates(results: Sequence[GateResult], *, where: str | None = None) -> None:
    """Raise MC401 when a gate is not met, naming each such metric with what was wanted and got."""
    unmet = [result for result in results if not result.passed]
    if not unmet:
        return
    told = "; ".join(f"{result.name}: wanted {result.wanted_text}, got {result.got_text}" for result in unmet)
    count = "a gate is" if len(unmet) == 1 else f"{len(unmet)} gates are"
    missing = any(result.got is None for result in unmet)
    raise MemcompileError(
        "MC401",
        f"{count} not met: {told}",
        where=where or "gates",
        fix="give an original and a text to measure against" if missing else "loosen the passes or the gate",
    )
