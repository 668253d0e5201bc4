"""Evaluation: measure original and rewritten models side by side, and check the plan's gates."""

from memcompile.evaluate.evaluation import Evaluation, evaluate
from memcompile.evaluate.gates import GateResult, check, raise_for_gates
from memcompile.evaluate.metrics import METRIC_NAMES, Metrics
from memcompile.evaluate.settings import EvaluationSettings
from memcompile.evaluate.texts import read_text

__all__ = [
    "METRIC_NAMES",
    "Evaluation",
    "EvaluationSettings",
    "GateResult",
    "Metrics",
    "check",
    "evaluate",
    "raise_for_gates",
    "read_text",
]
