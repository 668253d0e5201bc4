"""Lowering: what a backend is, which backends there are, and what they do with operators they do not have."""

from __future__ import annotations

from memcompile.lowering.backend import BACKENDS, Backend, Lowered, Progress, TunedBackend, get_backend
from memcompile.lowering.decompose import DefinitionInterpreter, inline_higher_order

__all__ = [
    "BACKENDS", "Backend", "DefinitionInterpreter", "Lowered", "Progress", "TunedBackend",
    "get_backend", "inline_higher_order",
]  # fmt: skip
