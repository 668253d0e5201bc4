"""The Python API: rewrite a model, call it like the original, generate, export."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memcompile import pipeline
from memcompile.errors import MemcompileError
from memcompile.frontend import Captured, capture
from memcompile.lowering import get_backend
from memcompile.plan import Plan, load_plan
from memcompile.progress import SILENT, Progress
from memcompile.runtime import Generation, Sampling
from memcompile.runtime.generate import generate
from memcompile.weights.parameter import materialise

PlanSource = Plan | str | os.PathLike[str] | Mapping[str, Any]


class CompiledModel(torch.nn.Module):
    """A rewritten model: called like the original, trainable, with `generate`, `export` and `report`.

    Its parameters are the original's own tensors, not copies; those of a model on disk are read now.
    """

    def __init__(self, captured: Captured, compiled: pipeline.Compiled, plan: Plan) -> None:
        super().__init__()
        backend: Any = get_backend("torch")
        backend = backend.tuned_for(pipeline.tuned_workload(plan))
        program = compiled.program
        # one call, so that the two functions share what they read
        materialise(compiled.captured.graph, program.forward, *([program.step] if program.step else []))
        self.module = backend.module(compiled.captured)
        self._captured = captured
        self._compiled = compiled
        self._plan = plan
        self._session = backend.session(compiled.program) if captured.model.causal else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward pass, rewritten: same arguments, same output type."""
        return self.module(*args, **kwargs)

    @property
    def report(self) -> dict[str, Any]:
        """What each pass did: regions rewritten, refusals with reasons, decisions, predicted state bytes.

        "tuned": what `generate` runs attention on, where something was measured on this machine.
        """
        tuned = [] if self._session is None else [dict(decision) for decision in self._session.decisions]
        return {"plan": self._plan.resolved(), **self._compiled.rewrite.as_dict(), "tuned": tuned}

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | torch.Tensor,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """Continue prompts of token ids, one list a row (rows may differ in length)."""
        if self._session is None:
            raise MemcompileError(
                "MC120",
                "this model does not predict next tokens, so it cannot generate",
                fix="call it instead",
            )
        rows = prompts.tolist() if isinstance(prompts, torch.Tensor) else [list(p) for p in prompts]
        facts = self._captured.model
        return generate(
            self._session, rows, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(),
            eos_token_ids=facts.eos_token_ids, max_positions=facts.max_positions,
        )  # fmt: skip

    def export(
        self,
        path: str | os.PathLike[str],
        target: str = "onnxruntime",
        *,
        evaluate: bool = False,
        force: bool = False,
        progress: Progress = SILENT,
    ) -> Path:
        """Write the rewritten model as an artifact for `target`; with `evaluate`, the gates must hold."""
        sections = self._plan.resolved()
        sections["target"] = {**sections["target"], "backend": target}
        if not evaluate:
            sections["gates"] = {}
        plan = load_plan(sections, base=self._plan.base)
        result = pipeline.export(
            self._captured,
            self._compiled,
            plan,
            Path(path),
            evaluate=evaluate,
            force=force,
            progress=progress,
        )
        return result.artifact


def optimize(
    model: torch.nn.Module | str,
    plan: PlanSource,
    example_inputs: Any = None,
    *,
    tokenizer: Any = None,
    calibration: Sequence[Mapping[str, torch.Tensor]] | None = None,
    progress: Progress = SILENT,
) -> CompiledModel:
    """Rewrite a model by a plan.

    model: a live `nn.Module`, or a source as the command line takes it.
    plan: a `Plan`, a path to a YAML file, or a mapping with the same keys.
    example_inputs: a tensor, a tuple or a dict of tensors; Hugging Face models need none.
    calibration: inputs to calibrate with, instead of the plan's calibration text.
    Raises `MemcompileError`: see docs/errors.md.
    """
    resolved = plan if isinstance(plan, Plan) else load_plan(plan)
    progress.stage("capture the model")
    wanted = resolved.model
    captured = capture(
        model, example_inputs, dtype=wanted.dtype, weights=wanted.weights, activations=wanted.activations,
        tokenizer=tokenizer,
    )  # fmt: skip
    windows = None if calibration is None else [dict(window) for window in calibration]
    compiled = pipeline.rewrite_captured(captured, resolved, windows=windows, progress=progress)
    return CompiledModel(captured, compiled, resolved)
