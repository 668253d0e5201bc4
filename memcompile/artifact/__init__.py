"""Artifacts on disk: the manifest and the directory. Needs only the standard library."""

from __future__ import annotations

from memcompile.artifact.manifest import (
    ChatEntry,
    EvictEntry,
    FileEntry,
    FunctionEntry,
    GroupEntry,
    Manifest,
    ModelEntry,
    PrefillEntry,
    StateEntry,
    TensorEntry,
    TokenizerEntry,
    parse_manifest,
    read_manifest,
)
from memcompile.artifact.step_bytes import StepBytes
from memcompile.artifact.store import Artifact, ArtifactWriter, open_artifact

__all__ = [
    "Artifact",
    "ArtifactWriter",
    "ChatEntry",
    "EvictEntry",
    "FileEntry",
    "FunctionEntry",
    "GroupEntry",
    "Manifest",
    "ModelEntry",
    "PrefillEntry",
    "StateEntry",
    "StepBytes",
    "TensorEntry",
    "TokenizerEntry",
    "open_artifact",
    "parse_manifest",
    "read_manifest",
]
