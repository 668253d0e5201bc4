"""Run artifacts. Needs onnxruntime, numpy and tokenizers; never the compiler, torch or transformers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memcompile.artifact import open_artifact
from memcompile.errors import MemcompileError

if TYPE_CHECKING:
    from memcompile.runtime.generate import Generation
    from memcompile.runtime.sampling import Sampling
    from memcompile.runtime.session import Session

__all__ = ["Generation", "Sampling", "Session", "load"]

_WHERE = {
    "Generation": "memcompile.runtime.generate",
    "Sampling": "memcompile.runtime.sampling",
    "Session": "memcompile.runtime.session",
}


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    provider: str | None = None,
    check_digests: bool = True,
) -> Session:
    """Check an artifact directory and open it.

    `threads` and `provider` ("cpu" or "cuda") are the artifact's own unless given.
    Raises MC112, MC501 to MC506, MC510 and MC511.
    """
    artifact = open_artifact(path, check_digests=check_digests)
    try:
        from memcompile.runtime.session import Session
    except ImportError as error:
        raise MemcompileError(
            "MC510", f"a package that running the artifact needs is not installed: {error}",
            fix="pip install onnxruntime numpy tokenizers",
        ) from error  # fmt: skip
    return Session(artifact, threads=threads, provider=provider)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
