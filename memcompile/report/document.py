"""The report as data: all that the table and the page show, under a versioned schema."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Final, TypeAlias

from memcompile.artifact.manifest import GroupEntry, Manifest, StateEntry
from memcompile.evaluate import Evaluation, GateResult
from memcompile.report.measures import MEASURES

SCHEMA: Final = 1

Document: TypeAlias = dict[str, Any]


def build_document(
    manifest: Manifest, evaluation: Evaluation | None, gates: Iterable[GateResult], *, name: str
) -> Document:
    """Put an artifact's facts, measurements and gate results together; `name` is the artifact's."""
    measured = evaluation.as_dict() if evaluation is not None else {}
    document: Document = {
        "schema": SCHEMA,
        "kind": "memcompile-report",
        "memcompile": _version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "artifact": name,
        "model": {
            "family": manifest.model.family,
            "parameters": manifest.model.parameters,
            "layers": manifest.model.layers,
            "vocab_size": manifest.model.vocab_size,
            "dtype": manifest.model.dtype,
        },
        "target": {"backend": manifest.backend, "device": manifest.device, "threads": manifest.threads},
        "gates": [gate.as_dict() for gate in gates],
    }
    for role in ("original", "rewritten", "hugging_face"):
        document[role] = measured.get(role)
    document |= {
        "ratios": {
            "to_original": ratios(document["rewritten"], document["original"]),
            "to_hugging_face": ratios(document["rewritten"], document["hugging_face"]),
        },
        "regions": [region_entry(state, manifest.group(state.group)) for state in manifest.states],
        "plan": manifest.plan,
        "decisions": list(manifest.decisions),
        "refusals": list(manifest.refusals),
        "settings": measured.get("settings"),
        "prediction": measured.get("prediction"),
        "attribution": measured.get("attribution"),
        "crossovers": measured.get("crossovers", []),
        "environment": measured.get("environment") or manifest.environment,
        "notes": measured.get("notes", []),
    }
    cleaned: Document = plain(document)
    return cleaned


def ratios(rewritten: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return rewritten / other of every measure that has a ratio; None without the other model."""
    if not rewritten or not other:
        return None
    found = {}
    for measure in MEASURES:
        after, before = rewritten.get(measure.name), other.get(measure.name)
        if measure.has_ratio and after is not None and before:
            found[measure.name] = after / before
    return found


def region_entry(state: StateEntry, group: GroupEntry) -> dict[str, Any]:
    """Describe what one cache keeps: its role is "full", "window" or "evict"."""
    role = "evict" if group.evict is not None else "window" if group.window else "full"
    layer = state.region.partition(".")[0]
    return {
        "region": state.region,
        "layer": int(layer) if layer.isdecimal() else None,
        "role": role,
        "heads": state.heads,
        "kv_heads": state.kv_heads,
        "head_dim": state.head_dim,
        "bits": state.bits,
        "dtype": state.dtype,
        "window_tokens": group.window or None,
        "sink_tokens": group.sinks,
        "block_tokens": group.block or None,
        "block_stride": group.stride or None,
        "keep_tokens": group.evict.keep_tokens if group.evict else None,
        "keep_fraction": group.evict.keep_fraction if group.evict else None,
        "summary": _summary(state, group),
    }


def _summary(state: StateEntry, group: GroupEntry) -> str:
    if group.evict is not None:
        kept = group.evict.keep_tokens
        parts = [
            f"keeps {kept} tokens"
            if kept is not None
            else f"keeps {group.evict.keep_fraction:.0%} of the prompt"
        ]
    elif group.window:
        parts = [f"window {group.window}"]
        if group.sinks:
            parts.append(f"{group.sinks} sinks")
        if group.stride:
            parts.append(f"every {group.stride}th block of {group.block}")
    else:
        parts = ["every token"]
    parts.append(f"int{state.bits}" if state.bits else state.dtype)
    return ", ".join(parts)


def plain(value: Any) -> Any:
    """Return JSON values only: tuples as lists, what is not finite as null, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def _version() -> str:
    try:
        return metadata.version("memcompile")
    except metadata.PackageNotFoundError:
        return "uninstalled"
