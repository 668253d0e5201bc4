"""Tiny models of every supported family: real architectures, random weights from a fixed seed, fast to run.

Widths are small and uneven on purpose (head width is not model width / heads, windows are shorter than the
prompts that tests use), so that a mixed-up axis or an ignored window shows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from memcompile.frontend import Captured

VOCAB_SIZE: Final = 128
WINDOW_TOKENS: Final = 8
SEED: Final = 20_240

_TEXT: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ALTERNATING: Final[dict[str, Any]] = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW_TOKENS,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS: Final[dict[str, Any]] = {"num_experts": 4, "num_experts_per_tok": 2}

# family -> (class of the configuration, its values)
_CAUSAL: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("LlamaConfig", _TEXT),
    "qwen2": ("Qwen2Config", {**_TEXT, "hidden_size": 64}),
    "qwen3": ("Qwen3Config", _TEXT),
    "mistral": ("MistralConfig", {**_TEXT, "sliding_window": WINDOW_TOKENS}),
    "gemma3": ("Gemma3TextConfig", {**_TEXT, **_ALTERNATING, "query_pre_attn_scalar": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            **_TEXT,
            **_ALTERNATING,
            "query_pre_attn_scalar": 16,
            # low enough that random scores reach the bend
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "phi3": ("Phi3Config", {**_TEXT, "hidden_size": 64}),
    "mixtral": ("MixtralConfig", {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {**_TEXT, "hidden_size": 64, **_EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_TEXT, **_EXPERTS, "moe_intermediate_size": 32}),
}

CAUSAL_FAMILIES: Final = tuple(_CAUSAL)
OTHER_FAMILIES: Final = ("bert", "vit", "transformer_encoder")
FAMILIES: Final = CAUSAL_FAMILIES + OTHER_FAMILIES


class Encoder(nn.Module):
    """A plain `nn.TransformerEncoder`, as a user would write it: x [B,T,M] -> [B,T,M]."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            d_model=32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.encoder(x)
        return encoded


def tiny_model(family: str, **overrides: Any) -> nn.Module:
    """A fresh copy of the family's tiny model in eval mode; `overrides` are values of its configuration."""
    return copy.deepcopy(_built(family, _Frozen(overrides)))


def captured_tiny(family: str, **overrides: Any) -> Captured:
    """The family's tiny model captured, with a graph of the caller's own: a process captures each once."""
    from memcompile.program import copy_graph

    captured = _captured(family, _Frozen(overrides))
    return dataclasses.replace(captured, graph=copy_graph(captured.graph))


def example_inputs(
    family: str, *, batch: int = 2, tokens: int = 11, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs by name for one call of the family's model."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if family == "transformer_encoder":
        return {"x": torch.randn(batch, tokens, 32, generator=generator)}
    # 0, 1 and 2 are padding, begin and end
    return {"input_ids": torch.randint(3, VOCAB_SIZE, (batch, tokens), generator=generator)}


def save_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Write the family's tiny model to `folder` as Hugging Face does, with a tokenizer; returns `folder`."""
    model: Any = tiny_model(family, **overrides)
    model.save_pretrained(folder)
    if family in CAUSAL_FAMILIES or family == "bert":
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A tokenizer with one token per ASCII character (id = code point); 0, 1, 2 are <pad>, <s>, </s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {
        **{name: index for index, name in enumerate(special)},
        **{chr(i): i for i in range(3, VOCAB_SIZE)},
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )


class _Frozen(dict[str, Any]):
    """Keyword values as a key of the cache."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@functools.lru_cache(maxsize=64)
def _built(family: str, overrides: _Frozen) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return _BUILDERS.get(family, functools.partial(_causal, family))(overrides).eval()


@functools.cache
def _captured(family: str, overrides: _Frozen) -> Captured:
    from memcompile.frontend import capture

    inputs = example_inputs(family) if family == "transformer_encoder" else None
    return capture(tiny_model(family, **overrides), inputs)


def _causal(family: str, overrides: _Frozen) -> nn.Module:
    import transformers

    name, values = _CAUSAL[family]
    config = getattr(transformers, name)(**{**values, **overrides})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def _bert(overrides: _Frozen) -> nn.Module:
    from transformers import BertConfig, BertModel

    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    model: nn.Module = BertModel(BertConfig(**{**values, **overrides}), add_pooling_layer=False)
    return model


def _vit(overrides: _Frozen) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    values = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model: nn.Module = ViTModel(ViTConfig(**{**values, **overrides}), add_pooling_layer=False)
    return model


def _transformer_encoder(overrides: _Frozen) -> nn.Module:
    return Encoder()


_BUILDERS: Final[dict[str, Callable[[_Frozen], nn.Module]]] = {
    "bert": _bert,
    "vit": _vit,
    "transformer_encoder": _transformer_encoder,
}


def encoder_factory() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model source for `tests.models:encoder_factory`: the module and inputs to trace it with."""
    return tiny_model("transformer_encoder"), example_inputs("transformer_encoder")
