"""The torch target: the rewritten model as an `nn.Module`, and its program run step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from memcompile.backends.torch.module import RewrittenModule
from memcompile.backends.torch.session import TorchSession
from memcompile.backends.torch.triton import register_cuda
from memcompile.backends.torch.tuned import tuned_choices
from memcompile.errors import MemcompileError
from memcompile.lowering import Lowered, Progress
from memcompile.program import Program
from memcompile.tuning import Database, Workload
from memcompile.weights.parameter import materialise

if TYPE_CHECKING:
    from memcompile.frontend.captured import Captured

__all__ = ["RewrittenModule", "TorchBackend", "TorchSession"]

register_cuda()


class TorchBackend:
    """Runs rewritten models in the process that made them; it writes no artifacts.

    With a workload, sessions on the CPU run attention on what `memcompile tune --backend torch` found.
    """

    name = "torch"

    def __init__(self, workload: Workload | None = None, database: Database | None = None) -> None:
        self._workload = workload
        self._database = database or Database.at(None)

    def tuned_for(self, workload: Workload) -> TorchBackend:
        """This backend, with the implementations that were measured as the best for a workload."""
        return TorchBackend(workload, self._database)

    def module(self, captured: Captured) -> RewrittenModule:
        """The rewritten model, called like the original."""
        materialise(captured.graph)
        return RewrittenModule(captured)

    def session(self, program: Program, device: str = "cpu") -> TorchSession:
        """A causal program with the methods of `memcompile.runtime.Session`, on "cpu" or "cuda".

        Raises MC122 for a tuning database that cannot be read.
        """
        materialise(program.forward, *([program.step] if program.step is not None else []))
        choices = None
        if self._workload is not None and device == "cpu":
            choices = tuned_choices(program, self._workload, self._database)
        return TorchSession(program, device, choices)

    def lower(self, program: Program, destination: Path, *, device: str, progress: Progress) -> Lowered:
        """Raise MC112: what torch runs is a live module."""
        raise MemcompileError(
            "MC112",
            "the torch backend gives a live module, not an artifact",
            fix="use memcompile.optimize(model, plan) in Python, or set target.backend to onnxruntime",
        )
