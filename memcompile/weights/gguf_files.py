"""The tensors of a GGUF file as expressions: the floats that their blocks stand for, and their codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.weights.gguf_blocks import FORMATS, repack
from memcompile.weights.lazy import PIECE_BYTES, Cast, LazyTensor, Stored, Take, version_of
from memcompile.weights.methods import in_rows, lazy_weight


@dataclass(frozen=True)
class Dequantized(LazyTensor):
    """The floats that blocks of a GGUF format stand for, float32.

    blocks: uint8 [rows, bytes of a row]; kind: ggml's name of the format.
    """

    blocks: Stored
    kind: str
    to_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to_shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self, begin: int, end: int) -> torch.Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = self.blocks.read(begin, end).numpy()
        floats = np.array(dequantize(blocks, GGMLQuantizationType[self.kind]), dtype=np.float32)
        return torch.from_numpy(floats).reshape(end - begin, *self.to_shape[1:])


@dataclass(frozen=True)
class Repacked:
    """Blocks of a GGUF format as the dialect's codes; `index`: which rows, in which order, None for all."""

    blocks: Stored
    kind: str
    width: int
    index: tuple[int, ...] | None = None

    @property
    def _source(self) -> LazyTensor:
        return self.blocks if self.index is None else Take(self.blocks, self.index)

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        return repack(self.kind, self._source.read(begin, end).numpy(), self.width)

    def produce(self) -> dict[str, torch.Tensor]:
        # numpy computes codes of 16 bits on the way
        step = max(1, PIECE_BYTES // (4 * self.width))
        return in_rows(self._source.rows, step, self.rows)


def file_blocks(reader: Any, path: Path) -> dict[str, Dequantized]:
    """The tensors of an open `gguf.GGUFReader` by name; no block is read."""
    version = version_of(str(path))
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        rows = (shape[0], int(tensor.n_bytes) // shape[0])
        blocks = Stored(str(path.resolve()), int(tensor.data_offset), rows, torch.uint8, version)
        found[str(tensor.name)] = Dequantized(blocks, tensor.tensor_type.name, shape)
    return found


def stored_codes(expression: LazyTensor) -> tuple[str, QuantizedWeight] | None:
    """Format and codes of a weight [N,K] that stands for rows of a GGUF tensor; None when it does not.

    The codes are lazy; a format that is not in `FORMATS` has none.
    """
    while isinstance(expression, Cast):
        expression = expression.source
    index = expression.index if isinstance(expression, Take) else None
    source = expression.source if isinstance(expression, Take) else expression
    if not isinstance(source, Dequantized) or len(source.shape) != 2 or source.kind not in FORMATS:
        return None
    producer = Repacked(source.blocks, source.kind, source.shape[1], index)
    return source.kind, lazy_weight(producer, producer.rows(0, 1), expression.rows)
