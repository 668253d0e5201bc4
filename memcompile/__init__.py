"""memcompile: a declarative compiler that rewrites transformers into memory-efficient equivalents.

`import memcompile` is light: torch and the rest are loaded when `optimize` or `load` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memcompile.errors import MemcompileError

if TYPE_CHECKING:
    from memcompile.api import CompiledModel, optimize
    from memcompile.runtime import load

__all__ = ["CompiledModel", "MemcompileError", "load", "optimize"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from memcompile.runtime import load

        return load
    if name in ("CompiledModel", "optimize"):
        from memcompile import api

        return getattr(api, name)
    raise AttributeError(f"module 'memcompile' has no attribute {name!r}")
