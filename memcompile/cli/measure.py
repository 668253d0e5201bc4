"""Measure an artifact by the evaluation's own protocol; torch is not needed for an ONNX Runtime artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from memcompile.artifact import read_manifest
from memcompile.errors import MemcompileError
from memcompile.evaluate import Evaluation, EvaluationSettings, GateResult, check, evaluate
from memcompile.evaluate.metrics import cost_metrics
from memcompile.evaluate.process import Subject, artifact_digest, run_tasks
from memcompile.evaluate.settings import RUNTIME_OPENER
from memcompile.evaluate.tasks import ResultStore, Task
from memcompile.plan import Plan, load_plan
from memcompile.progress import Progress

_DEFAULT_LENGTHS: Final = (512, 2048, 8000)


def settings_of(
    artifact: Path, text: Path | None, prompt_tokens: int | None, *, quick: bool
) -> EvaluationSettings:
    """The protocol at the workload of the artifact's plan, on its evaluation text.

    Raises:
        MemcompileError: MC121, the text is not there.
    """
    plan = _plan_of(artifact, text)
    evaluation = plan.data.evaluation
    settings = EvaluationSettings(
        prompt_tokens=prompt_tokens or plan.workload.prompt_tokens,
        new_tokens=plan.workload.new_tokens,
        batch=plan.workload.batch,
        text=plan.text_path(evaluation) if evaluation else None,
        text_tokens=evaluation.tokens if evaluation else None,
    )
    return settings.quick() if quick else settings


def measure(
    artifact: Path, settings: EvaluationSettings, progress: Progress
) -> tuple[Evaluation, list[GateResult]]:
    """Measure an artifact alone; of its plan's gates, those that need no original are checked."""
    evaluation = evaluate(None, artifact, settings, progress=progress)
    gates = check(read_manifest(artifact).plan.get("gates"), evaluation)
    return evaluation, [gate for gate in gates if gate.got is not None]


def bench(
    artifact: Path, lengths: Sequence[int], *, new_tokens: int, repeats: int, progress: Progress
) -> dict[str, Any]:
    """Time and memory at several prompt lengths, each in a process of its own so that peaks do not mix.

    Raises:
        MemcompileError: MC120, the model is not causal; MC130, a prompt does not fit the model.
    """
    manifest = read_manifest(artifact)
    if not manifest.model.causal:
        raise MemcompileError(
            "MC120",
            "the model does not generate, so it has no prompt lengths",
            where=str(artifact),
            fix="use eval",
        )
    longest = manifest.model.max_positions or max(_DEFAULT_LENGTHS)
    wanted = sorted(set(lengths)) or [length for length in _DEFAULT_LENGTHS if length + new_tokens <= longest]
    text = _text_of(artifact)
    subject = Subject("rewritten", str(artifact), RUNTIME_OPENER, artifact_digest(artifact))
    rows = []
    with tempfile.TemporaryDirectory(prefix="memcompile-bench-") as folder:
        for length in wanted or [max(1, longest - new_tokens)]:
            progress.stage(f"{length:,} prompt tokens")
            task = Task(
                "cost",
                {
                    "prompt_tokens": length,
                    "longest_prompt_tokens": length,
                    "new_tokens": new_tokens,
                    "decode_tokens": new_tokens,
                    "batch": 1,
                    "repeats": repeats,
                    "seed": EvaluationSettings().seed,
                },
                {
                    "text": text,
                    "tokens_file": str(Path(folder) / f"prompt-{length}.npy"),
                },
            )
            store = ResultStore(Path(folder) / f"{length}.jsonl")
            (result,) = run_tasks(
                subject,
                [task],
                store,
                threads=None,
                update=lambda _, done, total: progress.update(done, total),
            )
            rows.append(cost_metrics(result, []))
    return {"artifact": str(artifact), "new_tokens": new_tokens, "repeats": repeats, "lengths": rows}


def _plan_of(artifact: Path, text: Path | None) -> Plan:
    """The sections of the artifact's plan that measuring needs; passes are not, so none is loaded."""
    written = read_manifest(artifact).plan
    sections: dict[str, Any] = {key: written[key] for key in ("workload", "data") if key in written}
    data = dict(sections.get("data") or {})
    data.pop("calibration", None)
    if text is not None:
        data["evaluation"] = {**(data.get("evaluation") or {}), "text": str(text)}
    try:
        return load_plan({**sections, "data": data})
    except MemcompileError as error:
        if error.code != "MC121":
            raise
        raise MemcompileError(
            error.code, error.message, where=str(artifact), fix="give a text with --text"
        ) from error


def _text_of(artifact: Path) -> str | None:
    """The plan's evaluation text if it is still there: timing needs some tokens, not good ones."""
    try:
        text = settings_of(artifact, None, None, quick=True).text
    except MemcompileError:
        return None
    return str(text) if text else None
