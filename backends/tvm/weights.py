"""The weights that a graph reads, each made when it is written, and the file that keeps them aligned."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx

from memcompile.dialect.quantized_weights import dequantize
from memcompile.regions import argument

WEIGHTS: Final = "weights.safetensors"
ALIGNMENT_BYTES: Final = 64
DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "int8": torch.int8,
    "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_NAMES: Final = {
    "float32": "F32", "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_LENGTH_BYTES: Final = 8
_CODES: Final = ("codes", "scales", "zero_points", "offsets", "table")


@dataclass(frozen=True)
class Weight:
    """A tensor of the artifact: `read` gives it when it is written. `key` tells equal ones."""

    key: Hashable
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Weight:
        """A tensor as it is, but float types as float32, whatever the model's."""
        plain = str(tensor.dtype).removeprefix("torch.")
        dtype = "float32" if tensor.is_floating_point() else plain
        return Weight(id(tensor), tuple(tensor.shape), dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


def weights_of(graph_module: fx.GraphModule) -> dict[str, Weight]:
    """What a graph reads, by name; a tensor with two names comes once, codes as what they stand for."""
    found: dict[str, Weight] = {}
    keys: set[Hashable] = set()

    def enter(name: str, weight: Weight) -> None:
        if weight.key not in keys:
            keys.add(weight.key)
            found[name] = weight

    for node in graph_module.graph.nodes:
        if code_key(graph_module, node) is not None:
            enter(f"{_tensors(graph_module, node)[0]}.float32", _dequantized(graph_module, node))
        elif node.op == "get_attr" and any(code_key(graph_module, user) is None for user in node.users):
            value = attribute(graph_module, str(node.target))
            if isinstance(value, torch.Tensor):
                enter(str(node.target), Weight.of(value))
    return found


def code_key(graph_module: fx.GraphModule, node: fx.Node) -> Hashable | None:
    """The key of the weight that a node reads as codes; None for other nodes, and computed codes."""
    targets = (
        torch.ops.memcompile.quantized_linear.default,
        torch.ops.memcompile.quantized_embedding.default,
    )
    if node.target not in targets:
        return None
    given = [argument(node, name) for name in _CODES]
    if any(isinstance(value, fx.Node) and value.op != "get_attr" for value in given):
        return None
    return ("codes", id(attribute(graph_module, str(given[0].target))))


def attribute(module: torch.nn.Module, name: str) -> Any:
    """What a `get_attr` node gives."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _tensors(graph_module: fx.GraphModule, node: fx.Node) -> tuple[str, list[torch.Tensor | None]]:
    given = [argument(node, name) for name in _CODES]
    values = [None if v is None else attribute(graph_module, str(v.target)) for v in given]
    return str(given[0].target), values


def _dequantized(graph_module: fx.GraphModule, node: fx.Node) -> Weight:
    _, (codes, scales, zero_points, offsets, table) = _tensors(graph_module, node)
    assert codes is not None
    assert scales is not None
    bits = argument(node, "bits")
    source = argument(node, "x") if "linear" in str(node.target) else node
    width = int(source.meta["val"].shape[-1])

    def read() -> torch.Tensor:
        return dequantize(codes, scales, zero_points, offsets, bits, width, torch.float32, table)

    return Weight(code_key(graph_module, node), (codes.shape[0], width), "float32", read)


def write_weights(path: Path, weights: Mapping[str, Weight], order: Mapping[str, Sequence[str]]) -> None:
    """Write `weights` to `path` as safetensors, one at a time.

    `order` lists, for each function, the weights it takes after its inputs. The format has no gaps between
    tensors, so those of whole 64-byte blocks come first: all of them are aligned then, and a reader that maps
    the file copies none but the last few, small ones.
    """
    names = sorted(weights, key=lambda name: weights[name].nbytes % ALIGNMENT_BYTES != 0)
    header: dict[str, Any] = {"__metadata__": {name: json.dumps(list(used)) for name, used in order.items()}}
    begin = 0
    for name in names:
        end = begin + weights[name].nbytes
        header[name] = {
            "dtype": _NAMES[weights[name].dtype],
            "shape": list(weights[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for name in names:
            stored = weights[name].read().detach().to("cpu", DTYPES[weights[name].dtype]).contiguous()
            assert tuple(stored.shape) == weights[name].shape, name
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
