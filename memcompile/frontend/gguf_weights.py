"""Keep the weights of a GGUF file as the file stores them, instead of the floats they were read as.

transformers permutes the rows of some tensors, and splits or joins others, while it reads a file. Nothing is
assumed about that: a tensor's blocks are taken when the model's weight is an expression of their rows
(`lazy_gguf.py`), or else when, row by row, they stand for exactly the floats that the model holds.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.errors import MemcompileError
from memcompile.frontend.captured import Captured
from memcompile.regions import Refusal, WeightRegion, weight_regions
from memcompile.weights.gguf_blocks import FORMATS, repack
from memcompile.weights.gguf_files import stored_codes
from memcompile.weights.methods import quantize
from memcompile.weights.parameter import expression_of
from memcompile.weights.place import Operands, replace, store

# formats that hold floats: there is nothing to keep
_FLOATS: Final = ("F32", "F16", "BF16", "F64")
# what a format that has no equal is stored in: 8 bits are close to any of them
_NEAREST: Final = {"bits": 8, "block": 32}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """How a weight of the file is stored in the program.

    error: of the dequantised weight, root mean square over that of the weight; 0 where codes were kept.
    """

    region: str
    file_format: str
    bits: int
    nbytes: int
    error: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def as_decision(self) -> dict[str, Any]:
        """What an artifact says of a weight that could not keep its codes."""
        told = f"{self.file_format} has no equal: quantised anew to {self.bits} bits, error {self.error:.2e}"
        return {"pass": "stored weights", "region": self.region, "decision": told}


def keep_stored_weights(captured: Captured, path: Path, *, int8_activations: bool) -> Captured:
    """The captured model with the file's own codes for every weight that has them.

    A weight whose tensor is not found, or stands for other floats than the model's, stays float, with the
    reason in `refusals`. Formats without an equal are quantised to 8 bits anew, with the error in `weights`.
    """
    graph = captured.graph
    file = _File(path)
    kept: list[StoredWeight] = []
    refusals: list[Refusal] = []
    placed: dict[str, tuple[Operands, int] | None] = {}
    for region in weight_regions(graph):
        if region.bits or region.stored is None:
            continue
        key = f"{region.weight.target} {region.transposed}"
        if key not in placed:
            found = _as_stored(region) or file.weight(region, _names(region, graph))
            if isinstance(found, str):
                refusals.append(Refusal(region.region, found, "stored weights"))
                placed[key] = None
            elif found is None:
                placed[key] = None
            else:
                weight, facts = found
                kept.append(facts)
                placed[key] = store(graph, region, weight), weight.bits
        stored = placed[key]
        if stored is not None:
            replace(region, stored[0], stored[1], int8_activations=int8_activations)
    graph.graph.lint()
    # a module of its own, so that the floats nobody reads any more are let go
    slim = fx.GraphModule(graph, graph.graph)
    return dataclasses.replace(
        captured, graph=slim, weights=tuple(kept), refusals=(*captured.refusals, *refusals)
    )


def _as_stored(region: WeightRegion) -> tuple[QuantizedWeight, StoredWeight] | None:
    """The codes of a weight that is still on disk, when they are there as a known format."""
    assert region.stored is not None
    found = stored_codes(expression_of(region.stored))
    if found is None:
        return None
    kind, weight = found
    return weight, StoredWeight(region.region, kind, weight.bits, weight.nbytes, 0.0)


def _names(region: WeightRegion, graph: fx.GraphModule) -> list[str]:
    """Names the weight may have in the model: where it is used, where it is stored, and what shares it."""
    names = [f"{region.path}.weight", str(region.weight.target)]
    names += [
        f"{other.path}.weight"
        for other in weight_regions(graph)
        if not other.bits and other.weight.target == region.weight.target
    ]
    return list(dict.fromkeys(names))


class _File:
    """Tensors of a GGUF file by the names that transformers' models have for them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def _reader(self) -> Any:
        import gguf

        try:
            return gguf.GGUFReader(self._path)
        except Exception as error:
            raise MemcompileError(
                "MC202",
                f"the GGUF file could not be read again for its weights: {error}",
                where=str(self._path),
                fix="check that the file is whole, or set model.weights to float32",
            ) from error

    @functools.cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @functools.cached_property
    def _map(self) -> Any:
        return _name_map(self._reader)

    def weight(
        self, region: WeightRegion, names: list[str]
    ) -> tuple[QuantizedWeight, StoredWeight] | str | None:
        """The weight as codes; None when the file has floats; a text when it cannot be kept, and why."""
        from gguf.quants import dequantize

        tensor = self._tensor(names)
        if tensor is None:
            return f"the file has no tensor that is known to be {names[0]}"
        kind = tensor.tensor_type.name
        if kind in _FLOATS:
            return None
        wanted = region.stored
        assert wanted is not None
        try:
            floats = np.asarray(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError:
            return f"the package gguf does not read {kind}"
        rows = matching_rows(floats, wanted)
        if rows is None:
            return f"{tensor.name} stands for other numbers than the model's {names[0]}"
        if kind in FORMATS:
            weight = repack(kind, np.asarray(tensor.data)[rows], region.width)
        else:
            weight = quantize(wanted.float(), zero_point="none", method="rtn", **_NEAREST)
        error = _relative_error(weight, wanted) if kind not in FORMATS else 0.0
        return weight, StoredWeight(region.region, kind, weight.bits, weight.nbytes, error)

    def _tensor(self, names: list[str]) -> Any:
        for name in names:
            known = self._map.get_name(name.removesuffix(".weight")) if self._map is not None else None
            for candidate in (f"{known}.weight", name):
                if candidate in self._tensors:
                    return self._tensors[candidate]
        return None


def _name_map(reader: Any) -> Any:
    """The package's own table from models' names to the file's; None for an architecture it does not know."""
    import gguf

    field = reader.fields.get("general.architecture")
    name = str(field.contents()) if field is not None else ""
    architecture = next((a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    blocks = reader.fields.get(f"{name}.block_count")
    if architecture is None or blocks is None:
        return None
    return gguf.get_tensor_name_map(architecture, int(blocks.contents()))


def matching_rows(floats: np.ndarray, wanted: torch.Tensor) -> np.ndarray | None:
    """For every row of the model's weight [N,K], the file's row that is equal to it; None if one has none.

    Equal means to the last bit, after the file's floats took the model's type.
    """
    if floats.ndim != 2 or floats.shape[1] != wanted.shape[1]:
        return None
    have = torch.from_numpy(np.ascontiguousarray(floats)).to(wanted.dtype)
    if have.shape == wanted.shape and torch.equal(have, wanted):
        return np.arange(len(floats))
    places = {_bytes(row): index for index, row in reversed(list(enumerate(have)))}
    rows = [places.get(_bytes(row)) for row in wanted]
    return None if None in rows else np.array(rows)


def _bytes(row: torch.Tensor) -> bytes:
    # adding zero turns -0 into 0: the two are equal numbers
    return (row.contiguous() + 0.0).view(torch.uint8).numpy().tobytes()


def _relative_error(weight: QuantizedWeight, wanted: torch.Tensor) -> float:
    dense = wanted.float()
    difference = weight.dequantized() - dense
    return float(difference.pow(2).mean().sqrt() / dense.pow(2).mean().sqrt().clamp(min=1e-30))
