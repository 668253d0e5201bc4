"""Run artifacts: the backend's runtime, numpy and tokenizers; never the compiler, torch or transformers."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Final

from memcompile.artifact import open_artifact
from memcompile.errors import MemcompileError

if TYPE_CHECKING:
    from memcompile.runtime.base import BaseSession
    from memcompile.runtime.generate import Generation
    from memcompile.runtime.sampling import Sampling
    from memcompile.runtime.session import Session

__all__ = ["BaseSession", "Generation", "Sampling", "Session", "load"]

# backend -> its session, and what running it needs
_SESSIONS: Final = {
    "onnxruntime": ("memcompile.runtime.session:Session", "onnxruntime numpy tokenizers"),
    "tvm": ("memcompile.runtime.tvm_session:TvmSession", "apache-tvm apache-tvm-ffi numpy tokenizers"),
}
_WHERE: Final = {
    "BaseSession": "memcompile.runtime.base",
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
) -> BaseSession:
    """Check an artifact directory and open it with its backend's session.

    `threads` and `provider` ("cpu" or "cuda") are the artifact's own unless given.
    Raises MC112, MC501 to MC506, MC510 and MC511.
    """
    artifact = open_artifact(path, check_digests=check_digests)
    backend = artifact.manifest.backend
    if backend not in _SESSIONS:
        raise MemcompileError(
            "MC112", f"the artifact is for backend {backend!r}, this runtime runs {', '.join(_SESSIONS)}",
            where=str(artifact.path), fix="make the artifact again with another target.backend",
        )  # fmt: skip
    place, needs = _SESSIONS[backend]
    module, _, name = place.partition(":")
    try:
        session: type[BaseSession] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MemcompileError(
            "MC510", f"a package that running the artifact needs is not installed: {error}",
            fix=f"pip install {needs}",
        ) from error  # fmt: skip
    return session(artifact, threads=threads, provider=provider)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
