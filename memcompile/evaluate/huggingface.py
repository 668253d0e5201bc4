"""The Hugging Face model itself behind the session interface: the time and memory a user has today.

fp32 weights, sdpa attention, `use_cache`, and logits of the last position only, as `generate` asks for them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memcompile.evaluate.memory import forget_peak_memory
from memcompile.frontend.sources import load_source


class _CacheState:
    """A transformers cache."""

    def __init__(self) -> None:
        self.cache: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value tensors held."""
        layers = getattr(self.cache, "layers", ())
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return sum(each.untyped_storage().nbytes() for each in tensors if isinstance(each, torch.Tensor))


class HuggingFaceSession:
    """Prefill and decode a transformers model with its own cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config.get_text_config()
        self.tokenizer = None
        facts = SimpleNamespace(
            vocab_size=config.vocab_size,
            max_positions=getattr(config, "max_position_embeddings", None),
            bos_token_id=config.bos_token_id,
        )
        self.manifest = SimpleNamespace(model=facts, tokenizer=None)

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> _CacheState:
        """Return an empty cache; transformers grows it as it goes."""
        del batch, prompt_tokens, new_tokens
        return _CacheState()

    def prefill(self, state: _CacheState, rows: list[list[int]]) -> list[NDArray[np.float32]]:
        """Run prompts of one length; return the last logits [1, V] of each."""
        return list(self._run(state, torch.tensor(rows, dtype=torch.int64))[:, None])

    def compress(self, state: _CacheState) -> None:
        """Nothing: transformers keeps what it has."""

    def decode(self, state: _CacheState, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one token per row; return logits [B, V]."""
        return self._run(state, torch.from_numpy(tokens)[:, None])

    @torch.inference_mode()
    def _run(self, state: _CacheState, tokens: torch.Tensor) -> NDArray[np.float32]:
        out = self._model(input_ids=tokens, past_key_values=state.cache, use_cache=True, logits_to_keep=1)
        state.cache = out.past_key_values
        logits: NDArray[np.float32] = out.logits[:, -1].float().numpy(force=True)
        return logits


def load(source: str, *, threads: int | None = None) -> HuggingFaceSession:
    """Load a model source as transformers does; the peak of loading (a GGUF's unpacking) is not counted."""
    if threads:
        torch.set_num_threads(threads)
    model: Any = load_source(source, "float32").module
    model.eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    forget_peak_memory()
    return HuggingFaceSession(model)
