"""Capture Hugging Face models through transformers' own extension points.

The attention interface calls `memcompile::attention`, the experts interface `memcompile::experts`, and the
mask interface builds nothing: what it would have built is proven to be the mask that the op states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from memcompile.errors import MemcompileError
from memcompile.frontend.captured import (
    BATCH,
    TOKENS,
    Captured,
    evaluating,
    export_graph,
    flatten_program,
    tensor_spec,
)
from memcompile.frontend.recognise import recognise, recognise_norms, recognise_rotary
from memcompile.frontend.verify import verify_capture
from memcompile.regions import ModelFacts, attention_nodes
from memcompile.weights.parameter import remembering

INTERFACE = "memcompile"
PROBE_TOKENS = 48
# weights on disk that are kept while model and graph are compared: both read them all
VERIFY_BYTES = 512 << 20

_ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: q [B,H,T,D], k and v [B,G,S,D]; returns [B,T,H,D]."""
    if other.get("s_aux") is not None:
        raise MemcompileError(
            "MC203",
            f"{type(module).__name__} adds learned sink logits to its attention; the dialect has none",
            where=type(module).__name__,
            fix="use a model without learned sink logits",
        )
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    if attention_mask is not None and attention_mask.ndim == 2:
        seen = attention_mask.to(torch.int64)
        positions = torch.where(seen > 0, seen.cumsum(-1) - 1, -1)
    elif attention_mask is not None:
        mask = attention_mask
    layer = getattr(module, "layer_idx", None)
    out, _, _ = torch.ops.memcompile.attention(
        query,
        key,
        value,
        positions=positions,
        mask=mask,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        causal=causal,
        window=int(sliding_window or 0),
        softcap=float(softcap or 0.0),
        region="" if layer is None else str(layer),
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """transformers' mask function: hand the two-dimensional padding mask on, build nothing."""
    return attention_mask


def _experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function; layouts that the dialect cannot state stay as batched products."""
    activation = _ACTIVATION_NAMES.get(str(getattr(getattr(self, "config", None), "hidden_act", "")))
    plain = (
        self.has_gate
        and not self.has_bias
        and not getattr(self, "has_post_expert_norm", False)
        and not getattr(self, "_is_expert_parallel", False)
        and type(self)._apply_gate.__module__.startswith("transformers.integrations")
    )
    if activation is None or not plain:
        batched: torch.Tensor = batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return batched
    mixed: torch.Tensor = torch.ops.memcompile.experts(
        hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, activation,
        bool(self.is_transposed),
    )  # fmt: skip
    return mixed


@contextlib.contextmanager
def interfaces(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention, masks and experts through the dialect; put everything back afterwards."""
    AttentionInterface.register(INTERFACE, _attention)
    AttentionMaskInterface.register(INTERFACE, _mask)
    ALL_EXPERTS_FUNCTIONS.register(INTERFACE, _experts)
    config = model.config
    attention = config._attn_implementation
    experts = getattr(config, "_experts_implementation", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.set_attn_implementation(INTERFACE)
        if experts is not None:
            model.set_experts_implementation(INTERFACE)
        if use_cache is not None:
            config.use_cache = False
        with evaluating(model):
            yield
    finally:
        model.set_attn_implementation(attention)
        if experts is not None:
            model.set_experts_implementation(experts)
        if use_cache is not None:
            config.use_cache = use_cache


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token from `input_ids` and `position_ids`."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and not getattr(
        model.config, "is_encoder_decoder", False
    )


def example_inputs_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs to trace with: token ids and positions, or pixels, or token ids with a padding mask."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, config.num_channels, height, width)}
    vocabulary = int(config.get_text_config().vocab_size)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or PROBE_TOKENS
    tokens = min(PROBE_TOKENS, int(limit))
    ids = torch.randint(0, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    if is_causal_lm(model):
        return {"input_ids": ids, "position_ids": torch.arange(tokens).repeat(2, 1)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def capture_huggingface(
    model: PreTrainedModel, example_inputs: dict[str, torch.Tensor] | None = None, tokenizer: Any = None
) -> Captured:
    """Capture a transformers model; its attention regions are found exactly, by construction."""
    causal = is_causal_lm(model)
    examples = dict(example_inputs) if example_inputs is not None else example_inputs_for(model)
    if causal and "position_ids" not in examples and "input_ids" in examples:
        ids = examples["input_ids"]
        examples["position_ids"] = torch.arange(ids.shape[1]).unsqueeze(0).repeat(ids.shape[0], 1)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    batch, tokens = torch.export.Dim(BATCH, min=1), torch.export.Dim(TOKENS, min=2, max=limit)
    dynamic: dict[str, dict[int, Any]] = {
        name: {0: batch} | ({1: tokens} if value.ndim == 2 else {}) for name, value in examples.items()
    }
    traced = {name: _enlarge(value) for name, value in examples.items()}
    with interfaces(model):
        program = export_graph(model, traced, dynamic)
    graph, rebuild, flat = flatten_program(program, tuple(traced))
    _name_regions(graph)
    recognise_norms(graph)
    recognise_rotary(graph)
    refusals = []
    if not attention_nodes(graph):
        # a model outside the attention interface: read it off the graph instead
        refusals = recognise(graph, tuple(traced.values()))
    logits = _logits_index(model, rebuild, flat) if causal else None
    with remembering(VERIFY_BYTES):
        verify_capture(model, graph, traced, logits)
    config = model.config.get_text_config()
    facts = ModelFacts(
        family=str(model.config.model_type),
        parameters=sum(p.numel() for p in model.parameters()),
        causal=causal,
        layers=int(getattr(config, "num_hidden_layers", 0)),
        vocab_size=getattr(config, "vocab_size", None),
        max_positions=getattr(config, "max_position_embeddings", None),
        bos_token_id=_first(getattr(model.config, "bos_token_id", None)),
        eos_token_ids=_token_ids(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    inputs = tuple(tensor_spec(n.name, n.meta["val"]) for n in graph.graph.nodes if n.op == "placeholder")
    outputs = tuple(
        tensor_spec("logits" if i == logits else f"output_{i}", v.meta["val"])
        for i, v in enumerate(flat)
        if isinstance(v, fx.Node)
    )
    return Captured(
        graph=graph, inputs=inputs, outputs=outputs, model=facts, rebuild=rebuild, logits_index=logits,
        tokenizer=tokenizer, refusals=tuple(refusals), example_inputs=examples,
    )  # fmt: skip


def _enlarge(value: torch.Tensor) -> torch.Tensor:
    """Sizes 0 and 1 are specialised by torch.export: trace with at least two rows and two tokens."""
    if value.shape[0] == 1:
        value = value.repeat(2, *[1] * (value.ndim - 1))
    if value.ndim == 2 and value.shape[1] == 1:
        value = value.repeat(1, 2)
    return value.contiguous()


def _name_regions(graph: fx.GraphModule) -> None:
    for order, node in enumerate(attention_nodes(graph)):
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        node.meta["path"] = path
        region = str(node.kwargs.get("region", "")) or str(order)
        node.kwargs = {**node.kwargs, "region": region}
        node.meta["layer"] = int(region)


def _logits_index(model: PreTrainedModel, rebuild: Callable[..., Any], flat: list[Any]) -> int:
    output = rebuild(tuple(range(len(flat))))
    index = output["logits"] if hasattr(output, "keys") else 0
    assert isinstance(index, int), f"{type(model).__name__} gives no logits"
    return index


def _first(value: Any) -> int | None:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return None if first is None else int(first)


def _token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    value = getattr(generation, "eos_token_id", None)
    value = getattr(model.config, "eos_token_id", None) if value is None else value
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
