"""Let onnxruntime-genai load an artifact whose states are plain key/value caches.

It feeds no `logit_positions`, and takes logits for the last token only when their token axis is declared
as 1. So it gets a graph of its own, which reads the same weights, and a `genai_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from memcompile.artifact.manifest import MASK_INPUT, GroupEntry, StateEntry
from memcompile.regions import ModelFacts

GENAI_CONFIG: Final = "genai_config.json"
GENAI_MODEL: Final = "genai.onnx"


def is_plain(states: Sequence[StateEntry], groups: Sequence[GroupEntry]) -> bool:
    """Whether onnxruntime-genai can drive these states: one dense float cache a layer, all alike."""
    return (
        bool(states)
        and [s.region for s in states] == [str(i) for i in range(len(states))]
        and [g.input for g in groups] == [MASK_INPUT]
        and all(s.dtype in ("float32", "float16") and not s.page_tokens for s in states)
        and len({(s.heads, s.kv_heads, s.head_dim) for s in states}) == 1
    )


def write_genai(
    model: ModelFacts, states: Sequence[StateEntry], folder: Path, step_file: str, *, device: str
) -> None:
    """Write the configuration and the graph that gives the last token's logits."""
    graph_model = ir.load(folder / step_file)
    graph = graph_model.graph
    wanted = next(value for value in graph.inputs if value.name == "logit_positions")
    graph.inputs.remove(wanted)
    wanted.const_value = ir.tensor(np.array([[-1]], np.int64), name=wanted.name)
    wanted.shape = ir.Shape([1, 1])
    graph.register_initializer(wanted)
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
    ir.save(graph_model, folder / GENAI_MODEL)
    config = genai_config(model, states, GENAI_MODEL, device=device)
    (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def genai_config(
    model: ModelFacts, states: Sequence[StateEntry], file: str, *, device: str
) -> dict[str, Any]:
    """The configuration; the graph needs nothing of onnxruntime-genai's own per-model code."""
    first = states[0]
    context = model.max_positions or 2**20
    eos = list(model.eos_token_ids)
    providers: list[dict[str, Any]] = [{"cuda": {}}] if device == "cuda" else []
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": model.bos_token_id if model.bos_token_id is not None else 0,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or 0,
            "pad_token_id": eos[0] if eos else 0,
            "context_length": context,
            "vocab_size": model.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "filename": file,
                "hidden_size": first.heads * first.head_dim,
                "head_size": first.head_dim,
                "num_attention_heads": first.heads,
                "num_key_value_heads": first.kv_heads,
                "num_hidden_layers": len(states),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": MASK_INPUT,
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
