"""Artifacts of tiny programs for tests, without the pipeline."""

from __future__ import annotations

from pathlib import Path

from memcompile.artifact import ArtifactWriter, Manifest, ModelEntry, PrefillEntry
from memcompile.frontend.captured import Captured
from memcompile.lowering import get_backend
from memcompile.program import Program, build_program
from memcompile.progress import SILENT
from memcompile.runtime import Session, load


def artifact_of(program: Program, target: Path, *, chunk_tokens: int = 16, device: str = "cpu") -> Path:
    """Lower the program into a loadable artifact directory."""
    model = program.model
    with ArtifactWriter(target) as writer:
        lowered = get_backend("onnxruntime").lower(program, writer.path, device=device, progress=SILENT.stage)
        writer.seal(
            Manifest(
                backend="onnxruntime",
                model=ModelEntry(
                    family=model.family,
                    vocab_size=model.vocab_size or 0,
                    max_positions=model.max_positions or 0,
                    eos_token_ids=model.eos_token_ids,
                    causal=model.causal,
                    layers=model.layers,
                ),
                functions=dict(lowered.functions),
                device=device,
                threads=1,
                states=lowered.states,
                groups=lowered.groups,
                prefill=PrefillEntry(chunk_tokens, lowered.prefill.extend_tokens),
            )
        )
        return writer.commit()


def session_of(captured: Captured, target: Path, *, chunk_tokens: int = 16) -> tuple[Program, Session]:
    """The program of a captured (and rewritten) model, and its artifact opened in the runtime."""
    program = build_program(captured)
    return program, load(artifact_of(program, target, chunk_tokens=chunk_tokens), threads=1)
