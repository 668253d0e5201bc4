"""Move a model's large tensors into one file beside it, equal ones once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir


def externalize(model: ir.Model, folder: Path, name: str, from_bytes: int) -> None:
    """Write tensors of at least `from_bytes` bytes to `folder/name`, one at a time; the model refers to it.

    Tensors with the same bytes take the same place in the file, whatever their shapes: the embedding that a
    head shares is read in another shape, and what is read without being changed shares its memory too.
    """
    values = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= from_bytes
    ]
    if not values:
        return
    first: dict[bytes, int] = {}
    places = [first.setdefault(_digest(value), index) for index, value in enumerate(values)]
    kept = sorted(set(places))
    tensors = [values[index].const_value for index in kept]
    written = ir.external_data.convert_tensors_to_external(
        [tensor for tensor in tensors if tensor is not None], folder, name, max_workers=1
    )
    stored = dict(zip(kept, written, strict=True))
    for value, place in zip(values, places, strict=True):
        tensor, at = value.const_value, stored[place]
        assert tensor is not None
        assert value.name is not None
        value.const_value = ir.ExternalTensor(
            at.location,
            at.offset,
            at.length,
            tensor.dtype,
            shape=ir.Shape(tensor.numpy().shape),
            name=value.name,
            base_dir=folder,
        )


def _digest(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return hashlib.sha256(value.const_value.numpy().tobytes()).digest()
