"""The manifest of a lowered program: what the artifact's directory says about itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from memcompile.artifact import Manifest, ModelEntry, StepBytes, TokenizerEntry
from memcompile.lowering.backend import Lowered
from memcompile.regions import ModelFacts

_PACKAGES = ("memcompile", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "apache-tvm")


def build_manifest(
    model: ModelFacts,
    lowered: Lowered,
    *,
    backend: str,
    device: str,
    threads: int,
    tokenizer: TokenizerEntry | None,
    plan: Mapping[str, Any],
    calibrations: Mapping[str, Any],
    decisions: Sequence[Any],
    refusals: Sequence[Any],
    step_bytes: StepBytes | None = None,
) -> Manifest:
    """The manifest of `lowered`, before its files are digested and its gates are known."""
    return Manifest(
        backend=backend,
        model=ModelEntry(
            family=model.family,
            vocab_size=model.vocab_size or 0,
            max_positions=model.max_positions or 0,
            bos_token_id=model.bos_token_id,
            eos_token_ids=model.eos_token_ids,
            causal=model.causal,
            layers=model.layers,
            parameters=model.parameters,
            dtype=model.dtype,
        ),
        functions=dict(lowered.functions),
        device=device,
        threads=threads,
        states=lowered.states,
        groups=lowered.groups,
        prefill=lowered.prefill,
        tokenizer=tokenizer,
        plan=dict(plan),
        calibrations=dict(calibrations),
        decisions=(*decisions, *lowered.decisions),
        refusals=tuple(refusals),
        step_bytes=step_bytes,
        environment=environment(),
    )


def environment() -> dict[str, Any]:
    """The versions and the machine an artifact was made with."""
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
