"""Write weights as safetensors, one tensor at a time, in an order that keeps them aligned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from memcompile.backends.tvm.trace import DTYPES, stored_dtype

WEIGHTS: Final = "weights.safetensors"
ALIGNMENT_BYTES: Final = 64
_NAMES: Final = {
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_LENGTH_BYTES: Final = 8


def write_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], order: Mapping[str, Sequence[str]]
) -> None:
    """Write `tensors` to `path`; `order` lists, for each function, the tensors it takes after its inputs.

    The format has no gaps between tensors, so those of whole 64-byte blocks come first: all of them are
    aligned then, and a reader that maps the file copies none but the last few, small ones.
    """
    sizes = {name: t.numel() * DTYPES[stored_dtype(t)].itemsize for name, t in tensors.items()}
    names = sorted(tensors, key=lambda name: sizes[name] % ALIGNMENT_BYTES != 0)
    header: dict[str, Any] = {"__metadata__": {name: json.dumps(list(used)) for name, used in order.items()}}
    begin = 0
    for name in names:
        end = begin + sizes[name]
        header[name] = {
            "dtype": _NAMES[stored_dtype(tensors[name])],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for name in names:
            stored = tensors[name].detach().to("cpu", DTYPES[stored_dtype(tensors[name])]).contiguous()
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
