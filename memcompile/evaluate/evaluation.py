"""Measure the original, the rewritten and, if asked, the Hugging Face model, each in its own processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from memcompile.artifact.manifest import Manifest, read_manifest
from memcompile.evaluate.attribution import Attribution, attribute
from memcompile.evaluate.crossover import Crossover, crossover_lengths, crossovers
from memcompile.evaluate.metrics import Metrics, cost_metrics, passkey_metrics, perplexity_metrics
from memcompile.evaluate.prediction import Prediction, compare_prediction, predict_state_bytes
from memcompile.evaluate.process import Subject, artifact_digest, run_tasks
from memcompile.evaluate.settings import HUGGING_FACE_OPENER, EvaluationSettings
from memcompile.evaluate.tasks import ResultStore, Task
from memcompile.evaluate.texts import text_digest
from memcompile.progress import SILENT, Progress

ROLES: Final = ("original", "rewritten", "hugging_face")
_STAGES: Final = {
    "cost": "time and memory",
    "perplexity": "perplexity and divergence",
    "passkey": "passkey retrieval",
    "forward": "time and outputs",
}
_PACKAGES: Final = ("memcompile", "onnxruntime", "numpy", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured; models that were not asked for are None."""

    original: Metrics | None
    rewritten: Metrics
    hugging_face: Metrics | None
    settings: EvaluationSettings
    prediction: Prediction | None
    crossovers: tuple[Crossover, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()
    attribution: Attribution | None = None

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        return {
            "original": self.original.as_dict() if self.original else None,
            "rewritten": self.rewritten.as_dict(),
            "hugging_face": self.hugging_face.as_dict() if self.hugging_face else None,
            "settings": self.settings.as_dict(),
            "prediction": self.prediction.as_dict() if self.prediction else None,
            "attribution": self.attribution.as_dict() if self.attribution else None,
            "crossovers": [crossover.as_dict() for crossover in self.crossovers],
            "environment": self.environment,
            "notes": list(self.notes),
        }


def evaluate(
    original: Path | None,
    rewritten: Path,
    settings: EvaluationSettings,
    *,
    source: str | None = None,
    progress: Progress = SILENT,
    work_dir: Path | None = None,
) -> Evaluation:
    """Evaluate artifacts by the protocol of docs/concepts/evaluation.md.

    `source` is the model the artifacts were made from; with it, the Hugging Face model is timed as well.
    In a given `work_dir`, finished tasks are kept and an interrupted evaluation goes on where it stopped.
    Raises MC121 (text), MC130 (prompt too long), MC402 (a process failed), and what opening artifacts raises.
    """
    artifacts: dict[str, Path] = (
        {"rewritten": rewritten} if original is None else {"original": original, "rewritten": rewritten}
    )
    manifests = {role: read_manifest(path) for role, path in artifacts.items()}
    subjects = {
        role: Subject(role, str(path), settings.opener, artifact_digest(path))
        for role, path in artifacts.items()
    }
    causal = manifests["rewritten"].model.causal
    if source is not None and causal:
        digest = _source_digest(source)
        subjects["hugging_face"] = Subject("hugging_face", source, HUGGING_FACE_OPENER, digest)
    with _folder(work_dir) as folder:
        run = _Run(settings, folder, subjects, manifests, progress)
        measured = run.causal() if causal else run.forward()
    return _conclude(measured, manifests, settings)


class _Run:
    """One evaluation: which tasks each model gets, and where their files lie."""

    def __init__(
        self,
        settings: EvaluationSettings,
        folder: Path,
        subjects: dict[str, Subject],
        manifests: dict[str, Manifest],
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._subjects = subjects
        self._manifests = manifests
        self._progress = progress
        self._store = ResultStore(folder / "results.jsonl")
        self._threads = settings.threads
        self._text = {"text": str(settings.text) if settings.text else None}
        self._common = {
            "seed": settings.seed,
            "prompt_tokens": settings.prompt_tokens,
            "text_digest": text_digest(settings.text),
        }

    def causal(self) -> dict[str, Metrics]:
        """Measure language models: cost in one process per model, quality in another."""
        # the models' costs are measured one right after the other, so that they meet the same machine
        costs = {role: self._work(role, self._cost_tasks()) for role in self._manifests}
        quality = {role: self._work(role, self._quality_tasks(role)) for role in costs}
        if "hugging_face" in self._subjects:
            costs["hugging_face"] = self._work("hugging_face", self._cost_tasks(lengths=False))
        return {role: self._metrics(role, cost, quality.get(role, [])) for role, cost in costs.items()}

    def forward(self) -> dict[str, Metrics]:
        """Measure models that are called once: time, memory, and how far the outputs moved."""
        measured = {}
        for role in self._subjects:
            repeats = max(3, self._settings.cost_repeats)
            task = Task(
                "forward",
                {**self._common, "batch": self._settings.batch, "repeats": repeats, **self._against(role)},
                self._exchange(role, "outputs.npz"),
            )
            measured[role] = Metrics(**cost_metrics(self._work(role, [task])[0], []))
        return measured

    def _work(self, role: str, tasks: list[Task]) -> list[dict[str, Any]]:
        label = role.replace("_", " ")
        self._progress.stage(f"evaluate {label}: load")
        current = ""

        def update(measure: str, done: int, total: int) -> None:
            nonlocal current
            if measure != current:
                self._progress.stage(f"evaluate {label}: {_STAGES[measure]}")
                current = measure
            self._progress.update(done, total)

        threads = self._threads
        if threads is None and role == "hugging_face":
            # the same number of threads as the artifacts use
            threads = self._manifests["rewritten"].threads or None
        return run_tasks(self._subjects[role], tasks, self._store, threads=threads, update=update)

    def _cost_tasks(self, *, lengths: bool = True) -> list[Task]:
        settings = self._settings
        parameters = {
            **self._common,
            "new_tokens": settings.new_tokens,
            "batch": settings.batch,
            "decode_tokens": settings.decode_tokens,
            "repeats": settings.cost_repeats,
            "longest_prompt_tokens": settings.prompt_tokens,
        }
        name = _short_digest([self._common, settings.batch, self._subjects["rewritten"].digest])
        files = {**self._text, "tokens_file": str(self._folder / f"prompt-{name}.npy")}
        tasks = [Task("cost", parameters, files)]
        if lengths and settings.crossover:
            for tokens in crossover_lengths(settings.prompt_tokens):
                tasks.append(Task("cost", {**parameters, "prompt_tokens": tokens, "repeats": 1}, files))
        return tasks

    def _quality_tasks(self, role: str) -> list[Task]:
        settings = self._settings
        perplexity = Task(
            "perplexity",
            {
                **self._common,
                "windows": settings.windows_in_budget(),
                "continuation_tokens": settings.continuation_tokens,
                **self._against(role),
            },
            {**self._text, **self._exchange(role, "log-probabilities.npy")},
        )
        if not settings.passkey_depths:
            return [perplexity]
        # the text is no part of it: the haystack is always the same filler
        common = {name: self._common[name] for name in ("seed", "prompt_tokens")}
        return [perplexity, Task("passkey", {**common, "depths": list(settings.passkey_depths)})]

    def _against(self, role: str) -> dict[str, str]:
        """What a result is compared with belongs to what decides it."""
        original = self._subjects.get("original")
        return {"against": original.digest if original and role != "original" else "nothing"}

    def _exchange(self, role: str, name: str) -> dict[str, str | None]:
        """The file the original writes and the rewritten model reads; none without an original."""
        original = self._subjects.get("original")
        if original is None:
            return {}
        settings = self._settings
        amount = [settings.windows_in_budget(), settings.continuation_tokens, settings.batch]
        path = str(self._folder / f"{_short_digest([original.digest, self._common, amount])}-{name}")
        return {"save_to": path} if role == "original" else {"compare_to": path}

    def _metrics(self, role: str, cost: list[dict[str, Any]], quality: list[dict[str, Any]]) -> Metrics:
        settings = self._settings
        perplexity = quality[0] if quality else None
        passkey = quality[1] if len(quality) > 1 else None
        same_work = perplexity is not None and settings.batch == 1
        values = cost_metrics(cost[0], perplexity["prefill_seconds"] if perplexity and same_work else [])
        if perplexity is not None:
            values |= perplexity_metrics(perplexity)
        if passkey is not None:
            values |= passkey_metrics(passkey)
        if role in self._manifests:
            values["state_bytes_predicted"] = predict_state_bytes(
                self._manifests[role],
                prompt_tokens=settings.prompt_tokens,
                new_tokens=settings.new_tokens,
                batch=settings.batch,
            )
        points = [cost_metrics(other, []) for other in cost]
        values["lengths"] = tuple(
            {name: point[name] for name in ("prompt_tokens", "prefill_seconds", "decode_seconds_per_token")}
            for point in points
            if "decode_seconds_per_token" in point
        )
        return Metrics(**values)


def _conclude(
    measured: dict[str, Metrics], manifests: dict[str, Manifest], settings: EvaluationSettings
) -> Evaluation:
    """Put the models side by side, and note what a reader must know to judge the numbers."""
    original, rewritten = measured.get("original"), measured["rewritten"]
    manifest = manifests["rewritten"]
    notes = []
    if settings.text is None or manifest.tokenizer is None:
        notes.append(
            "no text or no tokenizer: seeded random tokens were used; perplexity means nothing on them"
        )
    if settings.passkey_depths and manifest.model.causal and rewritten.passkey_accuracy is None:
        short = f"a prompt of {settings.prompt_tokens} tokens is too short"
        why = "the artifact has no tokenizer" if manifest.tokenizer is None else short
        notes.append(f"passkey retrieval was left out: {why}")
    if settings.windows_in_budget() < settings.windows:
        notes.append(f"the text budget pays for {settings.windows_in_budget()} of {settings.windows} windows")
    prediction = None
    if rewritten.state_bytes is not None and rewritten.state_bytes_predicted is not None:
        prediction = compare_prediction(
            manifest,
            predicted=rewritten.state_bytes_predicted,
            measured=rewritten.state_bytes,
            batch=settings.batch,
        )
        if not prediction.agrees:
            notes.append(
                f"{prediction.predicted} state bytes were predicted and {prediction.measured} measured: "
                "one of the two is wrong"
            )
    found: tuple[Crossover, ...] = ()
    if settings.crossover and original is not None:
        found = crossovers(original.lengths, rewritten.lengths, new_tokens=settings.new_tokens)
    return Evaluation(
        original=original,
        rewritten=rewritten,
        hugging_face=measured.get("hugging_face"),
        settings=settings,
        prediction=prediction,
        crossovers=found,
        environment=environment(),
        notes=tuple(notes),
        attribution=attribute(manifests, measured),
    )


def environment() -> dict[str, Any]:
    """Return what the numbers were measured on: machine, cores, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": cores,
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _source_digest(source: str) -> str:
    """Identify a model source by name, sizes and times: its weights are too large to read for this."""
    path = Path(source)
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([source, facts]).encode()).hexdigest()


def _short_digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _folder(work_dir: Path | None) -> Iterator[Path]:
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
        yield work_dir.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="memcompile-evaluation-") as folder:
        yield Path(folder)
