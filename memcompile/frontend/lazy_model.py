"""A transformers model whose parameters stay on disk.

transformers itself puts the model together, out of tensors that only know what they stand for: what it
renames, casts, splits, stacks or ties on the way becomes part of the expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memcompile.weights.lazy import LazyTensor
from memcompile.weights.parameter import parameter


def lazy_model(
    folder: Path, class_name: str, dtype: torch.dtype, tensors: Mapping[str, LazyTensor], config: Any = None
) -> Any:
    """The model of a folder over `tensors`, by their names in the checkpoint; nothing is read but its config.

    class_name: of transformers; an Auto class stands for the one that fits the configuration.
    """
    import transformers

    if config is None:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = getattr(transformers, class_name)
    if class_name.startswith("Auto"):
        kind = kind._model_mapping[type(config)]
    stored = {name: parameter(tensor) for name, tensor in tensors.items()}
    module = kind.from_pretrained(None, config=config, state_dict=stored, dtype=dtype)
    if (folder / "generation_config.json").is_file() and module.can_generate():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return module
