"""The protocol of a backend, what lowering gives back, and the registry of backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from memcompile.artifact.manifest import FunctionEntry, GroupEntry, PrefillEntry, StateEntry
from memcompile.errors import MemcompileError
from memcompile.program import Program
from memcompile.tuning import Workload

Progress = Callable[[str], None]

# name -> "module:class"; plugins add theirs as entry points of the group `memcompile.backends`
BACKENDS: Final[dict[str, str]] = {
    "onnxruntime": "memcompile.backends.onnxruntime:OnnxRuntimeBackend",
    "torch": "memcompile.backends.torch:TorchBackend",
    "tvm": "memcompile.backends.tvm:TvmBackend",
}
ENTRY_POINTS: Final = "memcompile.backends"


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a backend wrote: entries for the manifest, and the files, relative to the destination.

    `decisions`: what the backend chose that the plan did not spell out.
    """

    functions: Mapping[str, FunctionEntry]
    states: tuple[StateEntry, ...]
    groups: tuple[GroupEntry, ...]
    prefill: PrefillEntry
    files: tuple[str, ...]
    decisions: tuple[Mapping[str, Any], ...] = ()


class Backend(Protocol):
    """A target that programs are lowered to."""

    name: str

    def lower(self, program: Program, destination: Path, *, device: str, progress: Progress) -> Lowered:
        """Write the program's graphs and weights into the existing folder `destination`.

        `progress` is told the name of each stage as it begins.
        """
        ...


@runtime_checkable
class TunedBackend(Protocol):
    """A backend that chooses implementations by what `memcompile tune` measured."""

    def tuned_for(self, workload: Workload) -> Backend:
        """The backend that lowers for this workload."""
        ...


def get_backend(name: str) -> Backend:
    """The backend called `name`, imported on first use. Raises MC112 for an unknown name."""
    plugins = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    path = BACKENDS.get(name) or plugins.get(name)
    if path is None:
        known = sorted({*BACKENDS, *plugins})
        raise MemcompileError(
            "MC112",
            f"unknown backend {name!r}; known: {', '.join(known)}",
            fix=f"set target.backend to one of {', '.join(known)}",
        )
    module, _, attribute = path.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
