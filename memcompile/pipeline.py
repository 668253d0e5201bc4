"""The line every model follows: source, capture, passes, program, lowering, artifact, evaluation, report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memcompile import evaluate as evaluation_
from memcompile.artifact import Manifest
from memcompile.artifact.store import ArtifactWriter
from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.errors import MemcompileError
from memcompile.evaluate import Evaluation, EvaluationSettings, GateResult
from memcompile.evaluate.texts import read_text
from memcompile.frontend import Captured, capture
from memcompile.lowering import TunedBackend, get_backend
from memcompile.lowering.bundle import build_manifest
from memcompile.lowering.tokenizer import write_tokenizer
from memcompile.plan import Plan
from memcompile.program import Program, build_program, copy_graph
from memcompile.progress import SILENT, Progress
from memcompile.regions import attention_regions
from memcompile.report import write_reports
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.rewrite.step_bytes import step_bytes
from memcompile.tuning import Workload
from memcompile.weights.parameter import available_memory_bytes, remembering
from memcompile.weights.write import watched

CALIBRATION_WINDOW_TOKENS = 512
JSON_SCHEMA = 1
# characters of text to read for a token, more than any tokenizer averages on prose
_CHARACTERS_PER_TOKEN = 8

Windows = Sequence[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Compiled:
    """A rewritten model before it is lowered."""

    captured: Captured
    program: Program
    rewrite: RewriteResult


@dataclass(frozen=True)
class OptimizeResult:
    """What `optimize` made: where it is, and what was measured."""

    artifact: Path
    manifest: Manifest
    evaluation: Evaluation | None
    gates: tuple[GateResult, ...]
    rewrite: RewriteResult

    def as_dict(self) -> dict[str, Any]:
        """The result as `memcompile optimize --json` prints it."""
        measured = self.evaluation.as_dict() if self.evaluation else {}
        return {
            "schema": JSON_SCHEMA,
            "artifact": str(self.artifact),
            "gates": [gate.as_dict() for gate in self.gates],
            "original": measured.get("original"),
            "rewritten": measured.get("rewritten"),
            "hugging_face": measured.get("hugging_face"),
            "attribution": measured.get("attribution"),
            "passes": [outcome.as_dict() for outcome in self.rewrite.outcomes],
        }


class GatesUnmet(MemcompileError):
    """MC401 with everything that was measured, so that the table can be shown all the same."""

    def __init__(self, error: MemcompileError, result: OptimizeResult) -> None:
        super().__init__(error.code, error.message, where=error.where, fix=error.fix)
        self.result = result


def rewrite_captured(
    captured: Captured,
    plan: Plan,
    *,
    windows: Windows | None = None,
    progress: Progress = SILENT,
) -> Compiled:
    """Apply the plan's passes to a copy of the captured graph and build the rewritten program.

    windows: calibration inputs; when None they are read from the plan's calibration text.
    """
    graph = copy_graph(captured.graph)
    data = _calibration(captured, plan, windows) if plan.passes else None
    # calibration reads the weights once a window: as many as there is room for are kept while it runs
    with remembering(available_memory_bytes() // 4 if data is not None else 0):
        result = apply(graph, plan.passes, workload=plan.workload, calibration=data, progress=progress)
    rewritten = replace(captured, graph=graph)
    progress.stage("build the program")
    return Compiled(rewritten, build_program(rewritten), result)


def optimize(
    source: str | Captured,
    plan: Plan,
    out: Path,
    *,
    evaluate: bool = True,
    compare_with_source: bool = True,
    quick: bool = False,
    force: bool = False,
    windows: Windows | None = None,
    progress: Progress = SILENT,
) -> OptimizeResult:
    """Compile a model by a plan into an artifact directory.

    With `evaluate`, original and rewritten model are measured side by side, each in a process of its own, and
    the plan's gates must hold: otherwise `GatesUnmet` is raised and nothing is left under `out`.
    """
    _check_request(plan, evaluate)
    with ArtifactWriter(out, force=force) as writer:
        progress.stage("capture the model")
        captured = _captured(source, plan) if isinstance(source, str) else source
        compiled = rewrite_captured(captured, plan, windows=windows, progress=progress)
        beside = source if compare_with_source and isinstance(source, str) else None
        return _finish(writer, captured, compiled, plan, evaluate, beside, quick, progress)


def export(
    captured: Captured,
    compiled: Compiled,
    plan: Plan,
    out: Path,
    *,
    evaluate: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> OptimizeResult:
    """Write an already rewritten model as an artifact; `captured` is the original it is compared with."""
    _check_request(plan, evaluate)
    with ArtifactWriter(out, force=force) as writer:
        return _finish(writer, captured, compiled, plan, evaluate, None, False, progress)


def _captured(source: str, plan: Plan) -> Captured:
    wanted = plan.model
    return capture(source, dtype=wanted.dtype, weights=wanted.weights, activations=wanted.activations)


def _check_request(plan: Plan, evaluate: bool) -> None:
    if not evaluate and plan.gates.limits():
        raise MemcompileError(
            "MC120",
            "the plan has gates, and gates need the evaluation",
            where=plan.where("gates"),
            fix="leave out --no-evaluate, or remove the gates from the plan",
        )
    get_backend(plan.target.backend)


def _finish(
    writer: ArtifactWriter,
    captured: Captured,
    compiled: Compiled,
    plan: Plan,
    evaluate: bool,
    beside: str | None,
    quick: bool,
    progress: Progress,
) -> OptimizeResult:
    """Lower, evaluate, check gates, report and commit; an error on the way leaves nothing behind."""
    manifest = writer.seal(write_artifact(compiled, plan, writer.path, progress))
    result = OptimizeResult(writer.target, manifest, None, (), compiled.rewrite)
    if evaluate:
        measured = _measure(captured, plan, writer.path, beside, quick=quick, progress=progress)
        gates = tuple(evaluation_.check(plan.gates, measured))
        manifest = replace(manifest, gates=tuple(gate.as_dict() for gate in gates))
        result = replace(result, manifest=manifest, evaluation=measured, gates=gates)
        try:
            evaluation_.raise_for_gates(gates, where=plan.where("gates"))
        except MemcompileError as error:
            raise GatesUnmet(error, result) from error
    progress.stage("write the report")
    write_reports(writer.path, manifest, result.evaluation, result.gates, name=writer.target.name)
    manifest = writer.seal(manifest)
    writer.commit()
    return replace(result, manifest=manifest)


def write_artifact(compiled: Compiled, plan: Plan, folder: Path, progress: Progress = SILENT) -> Manifest:
    """Lower a program into `folder`, with its tokenizer; gives the manifest to seal it with."""
    backend = get_backend(plan.target.backend)
    if isinstance(backend, TunedBackend):
        backend = backend.tuned_for(tuned_workload(plan))
    captured = compiled.captured
    with watched(progress.update):
        lowered = backend.lower(compiled.program, folder, device=plan.target.device, progress=progress.stage)
    tokenizer = write_tokenizer(captured.tokenizer, folder, captured.model.eos_token_ids)
    result = compiled.rewrite
    refusals = [*captured.refusals, *result.refusals]
    return build_manifest(
        captured.model,
        lowered,
        backend=backend.name,
        device=plan.target.device,
        threads=plan.target.threads,
        tokenizer=tokenizer,
        plan=plan.resolved(),
        calibrations=result.calibrations,
        decisions=[
            *(weight.as_decision() for weight in captured.weights if weight.error),
            *(decision.as_dict() for decision in result.decisions),
        ],
        refusals=[{"pass": r.pass_name, "where": r.where, "reason": r.reason} for r in refusals],
        step_bytes=step_bytes(captured.graph, plan.workload) if captured.model.causal else None,
    )


def tuned_workload(plan: Plan) -> Workload:
    """What implementations are chosen for, by what was tuned on this machine."""
    use = plan.workload
    return Workload(use.prompt_tokens, use.new_tokens, use.batch, plan.target.threads)


def inspect(
    source: str | Captured, *, dtype: str | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """The regions of a model, as `memcompile inspect --json` prints them."""
    progress.stage("capture the model")
    captured = capture(source, dtype=dtype) if isinstance(source, str) else source
    return {
        "schema": JSON_SCHEMA,
        "model": source if isinstance(source, str) else captured.model.family,
        "family": captured.model.family,
        "parameters": captured.model.parameters,
        "regions": [region.as_dict() for region in attention_regions(captured.graph)],
        "weights": [weight.as_dict() for weight in captured.weights],
        "refusals": [{"where": r.where, "reason": r.reason} for r in captured.refusals],
    }


def evaluation_settings(plan: Plan, *, quick: bool = False) -> EvaluationSettings:
    """The protocol at the plan's workload, on the plan's evaluation text."""
    text = plan.data.evaluation
    settings = EvaluationSettings(
        prompt_tokens=plan.workload.prompt_tokens,
        new_tokens=plan.workload.new_tokens,
        batch=plan.workload.batch,
        text=plan.text_path(text) if text else None,
        text_tokens=text.tokens if text else None,
        threads=plan.target.threads,
    )
    return settings.quick() if quick else settings


def _measure(
    captured: Captured, plan: Plan, rewritten: Path, source: str | None, *, quick: bool, progress: Progress
) -> Evaluation:
    """Lower the original beside the rewritten model and evaluate both."""
    dense = replace(plan, passes=())
    with tempfile.TemporaryDirectory(prefix="memcompile-original-") as folder:
        progress.stage("lower the original, to compare with")
        original = Path(folder) / "original"
        with ArtifactWriter(original) as writer:
            writer.seal(write_artifact(rewrite_captured(captured, dense), dense, writer.path))
            writer.commit()
        settings = evaluation_settings(plan, quick=quick)
        return evaluation_.evaluate(original, rewritten, settings, source=source, progress=progress)


def _calibration(captured: Captured, plan: Plan, windows: Windows | None) -> CalibrationData | None:
    if windows is not None:
        return CalibrationData(tuple(windows))
    text = plan.data.calibration
    if text is None or captured.tokenizer is None:
        return None
    content = read_text(plan.text_path(text))[: text.tokens * _CHARACTERS_PER_TOKEN]
    tokens = captured.tokenizer(content, verbose=False).input_ids[: text.tokens]
    windows = token_windows(tokens, min(CALIBRATION_WINDOW_TOKENS, len(tokens)))
    span = plan.workload.prompt_tokens + plan.workload.new_tokens
    return CalibrationData(_spread(windows, min(span, captured.model.max_positions or span)))


def _spread(windows: Windows, span: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Shift the windows' positions evenly over `span` tokens.

    Keys are cached after their rotary embedding: a channel that turns slowly reaches values at position 4,000
    that it never has among the first 500, and a scale that did not see them clips them.
    """
    last = max(0, span - windows[0]["position_ids"].shape[1])
    steps = max(1, len(windows) - 1)
    return tuple(
        {**window, "position_ids": window["position_ids"] + last * index // steps}
        for index, window in enumerate(windows)
    )
