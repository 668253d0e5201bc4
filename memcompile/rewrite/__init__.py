"""Rewriting: the pass contract, the registry, selectors, and the manager that orders, runs and checks passes.

`entry`, `registry` and `selectors` are light. The rest loads torch, so the names below come when asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from memcompile.rewrite.entry import PassEntry, Workload, WorkloadSizes
    from memcompile.rewrite.manager import PassOutcome, RewriteResult, apply
    from memcompile.rewrite.pass_ import Context, Exactness, Order, Pass, PassConfig, Preset
    from memcompile.rewrite.registry import load_pass, pass_names

__all__ = [
    "Context", "Exactness", "Order", "Pass", "PassConfig", "PassEntry", "PassOutcome", "Preset",
    "RewriteResult", "Workload", "WorkloadSizes", "apply", "load_pass", "pass_names",
]  # fmt: skip

_HOMES: Final[dict[str, str]] = {
    "PassEntry": "entry",
    "Workload": "entry",
    "WorkloadSizes": "entry",
    "PassOutcome": "manager",
    "RewriteResult": "manager",
    "apply": "manager",
    "Context": "pass_",
    "Exactness": "pass_",
    "Order": "pass_",
    "Pass": "pass_",
    "PassConfig": "pass_",
    "Preset": "pass_",
    "load_pass": "registry",
    "pass_names": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
