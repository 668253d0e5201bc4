"""Predict a state's bytes from the manifest, and compare that with what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from memcompile.artifact.manifest import GroupEntry, Manifest, StateEntry

# buffers may be rounded up and windows hold part of a chunk while it is read
TOLERANCE: Final = 0.1
_ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted and measured state bytes of a model; `agrees` is what the report flags when false."""

    predicted: int
    measured: int
    agrees: bool

    def as_dict(self) -> dict[str, Any]:
        return {"predicted": self.predicted, "measured": self.measured, "agrees": self.agrees}


def slots(group: GroupEntry, prompt_tokens: int, new_tokens: int) -> int:
    """Return how many tokens a row's cache in this group must hold after the prompt.

    Evicted: what is kept and the new tokens. Windowed: sinks, window, and the strided blocks outside of it.
    Else all tokens.
    """
    total = prompt_tokens + new_tokens
    if group.evict is not None:
        evict = group.evict
        share = math.ceil((evict.keep_fraction or 0) * prompt_tokens)
        kept = evict.keep_tokens if evict.keep_tokens is not None else share
        return min(prompt_tokens, kept) + new_tokens
    if group.window:
        strided = math.ceil(total / (group.block * group.stride)) * group.block if group.stride else 0
        return min(total, group.sinks + group.window + strided)
    return total


def predict_state_bytes(manifest: Manifest, *, prompt_tokens: int, new_tokens: int, batch: int) -> int:
    """Return the bytes of all key and value buffers that decoding holds, observed queries not counted."""
    return sum(
        batch * slots(manifest.group(state.group), prompt_tokens, new_tokens) * token_bytes(state)
        for state in manifest.states
    )


def token_bytes(state: StateEntry) -> int:
    """Return the bytes that one token of one row takes: a key and a value per key/value head."""
    return 2 * state.kv_heads * state.stored_width * _ELEMENT_BYTES[state.dtype]


def compare_prediction(manifest: Manifest, *, predicted: int, measured: int, batch: int) -> Prediction:
    """Compare, allowing a tenth, one prefill chunk per window and the observed queries."""
    slack = 0
    for state in manifest.states:
        group = manifest.group(state.group)
        if group.window:
            slack += batch * manifest.prefill.chunk_tokens * token_bytes(state)
        if group.evict is not None:
            slack += batch * state.heads * state.head_dim * group.evict.observe_tokens * 4
    low, high = predicted * (1 - TOLERANCE), predicted * (1 + TOLERANCE) + slack
    return Prediction(predicted, measured, agrees=low <= measured <= high)
