"""What transformers makes of the tensors of a GGUF file, as expressions.

transformers renames tensors, permutes the rows of some and changes others. Its own functions say which: each
is given the numbers of the rows instead of the weights, and what comes back tells what it does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcompile.weights.gguf_files import Dequantized, file_blocks
from memcompile.weights.lazy import LazyTensor, Mapped, Take


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file's configuration and tensors, by the names that transformers' model has for them."""

    config: Any
    class_name: str
    tensors: dict[str, LazyTensor]


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """While this is open, a GGUF file is parsed once, whoever opens it.

    Parsing a vocabulary takes seconds: transformers does it for the configuration, and again for the
    tokenizer. It also makes the same table of names for each module of a model.
    """
    import gguf

    package: Any = gguf

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            # a slice of an array costs half of one of a memory map, and there are a million
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    before = package.GGUFReader, package.get_tensor_name_map
    reader = functools.cache(Reader)
    package.GGUFReader = lambda path: reader(os.path.realpath(path))
    package.get_tensor_name_map = functools.cache(package.get_tensor_name_map)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = before


def read_gguf(path: Path) -> GgufSource | None:
    """The file's model; None when transformers builds a tensor out of several, which is not followed here."""
    import gguf
    import transformers
    from transformers import modeling_gguf_pytorch_utils as reading

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    reader = gguf.GGUFReader(path)
    architecture = str(reading.read_field(reader, "general.architecture")[0])
    settings = json.dumps({k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str))})
    processor = _processor(architecture, settings)
    with torch.device("meta"):
        names = reading.get_gguf_hf_weights_map(kind(config), processor)
    found: dict[str, LazyTensor] = {}
    for name, tensor in file_blocks(reader, path).items():
        made = _processed(tensor, processor, _Process(architecture, name, settings), names)
        if made is None:
            return None
        if name in names:
            found[names[name]] = made
    return GgufSource(config, kind.__name__, found)


def _processor(architecture: str, settings: str) -> Any:
    from transformers import modeling_gguf_pytorch_utils as reading

    kind = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
    return kind(config=json.loads(settings))


@dataclass(frozen=True)
class _Process:
    """transformers' change of one tensor, as a value."""

    architecture: str
    name: str
    settings: str

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        processor = _processor(self.architecture, self.settings)
        made = processor.process(weights=tensor.numpy(), name=self.name)
        return torch.from_numpy(np.copy(made.weights))


def _processed(tensor: Dequantized, processor: Any, process: _Process, names: Any) -> LazyTensor | None:
    """What the processor makes of a tensor; None when it does more than give another one of the same name."""
    rows = np.arange(tensor.rows, dtype=np.float64)
    probe = rows if len(tensor.shape) == 1 else np.stack([rows] * 2, axis=1)
    if len(tensor.shape) > 2:
        probe = np.broadcast_to(rows.reshape(-1, *[1] * (len(tensor.shape) - 1)), tensor.shape)
    aside: dict[str, Any] = {"tensors": {}}
    made = processor.process(
        weights=probe, name=process.name, tensor_key_mapping=names, parsed_parameters=aside
    )
    if aside["tensors"] or made.name != process.name:
        return None
    got = np.asarray(made.weights)
    if got.shape == probe.shape:
        first = got.reshape(len(got), -1)[:, :1]
        if (got.reshape(len(got), -1) == first).all():
            index = first[:, 0]
            if (index == rows).all():
                return tensor
            if (np.sort(index) == rows).all():
                return Take(tensor, tuple(int(row) for row in index))
    shape = process(torch.zeros(1).expand(tensor.shape)).shape
    return Mapped(tensor, process, tuple(shape), torch.float32)
