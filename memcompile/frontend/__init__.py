"""Capture: from a model source to one graph of un-decomposed ATen and dialect operators."""

from __future__ import annotations

from typing import Any

import torch

from memcompile.errors import MemcompileError
from memcompile.frontend.captured import Captured
from memcompile.frontend.sources import LoadedModel, load_source

__all__ = ["Captured", "LoadedModel", "capture", "load_source"]


def capture(
    source: str | torch.nn.Module,
    example_inputs: Any = None,
    *,
    dtype: str | None = None,
    weights: str = "stored",
    activations: str = "float",
    tokenizer: Any = None,
) -> Captured:
    """Capture a model.

    source: a Hugging Face folder, a .gguf file, `package.module:function`, or a live `nn.Module`.
    example_inputs: a tensor, a tuple or a dict; needed for modules that transformers does not know.
    dtype: "float32" (the default for files), "bfloat16" or "float16".
    weights: "stored" keeps the codes of a GGUF file; "float32" takes the floats they stand for.
    activations: "float" or "int8": what kept codes are multiplied with.
    Raises MC20x: the source is missing, is not a model, or cannot be traced.
    """
    loaded = (
        load_source(source, dtype, lazy=True) if isinstance(source, str) else LoadedModel(source, tokenizer)
    )
    from transformers import PreTrainedModel

    examples = example_inputs if example_inputs is not None else loaded.example_inputs
    if isinstance(loaded.module, PreTrainedModel):
        from memcompile.frontend.huggingface import capture_huggingface

        if isinstance(examples, torch.Tensor):
            examples = {loaded.module.main_input_name: examples}
        elif isinstance(examples, (tuple, list)):
            examples = {loaded.module.main_input_name: examples[0]}
        captured = capture_huggingface(loaded.module, examples, loaded.tokenizer)
        if loaded.gguf is not None and weights == "stored":
            from memcompile.frontend.gguf_weights import keep_stored_weights

            captured = keep_stored_weights(captured, loaded.gguf, int8_activations=activations == "int8")
        return captured
    if examples is None:
        raise MemcompileError(
            "MC205",
            f"{type(loaded.module).__name__} needs example inputs to be captured",
            fix="pass example_inputs, or let the factory return (module, example_inputs)",
        )
    from memcompile.frontend.generic import capture_module

    return capture_module(loaded.module, examples)
