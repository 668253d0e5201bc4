"""Quantise weights on calibration data: one sweep, each layer seeing those before it quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache
from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.calibrate.sweep import sweep
from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.errors import MemcompileError
from memcompile.progress import Progress
from memcompile.regions import WeightRegion
from memcompile.rewrite.fingerprint import graph_text
from memcompile.weights.gptq import gptq
from memcompile.weights.methods import ZeroPoint
from memcompile.weights.place import operands, tensors_of

VERSION: Final = 1
aten: Any = torch.ops.aten


def calibrate_gptq(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    *,
    bits: int,
    block: int,
    zero_point: ZeroPoint,
    data: CalibrationData,
    progress: Progress,
) -> Calibration:
    """The codes of every product among `regions`, as statistics; remembered by what they depend on.

    Raises:
        MemcompileError: MC107, there are no windows.
    """
    if not data.windows:
        raise MemcompileError(
            "MC107", "data.calibration: needed, and missing", fix="name a text in data.calibration"
        )
    tables = {str(r.weight.target) for r in regions if r.kind == "embedding"}
    products = {r.node: r for r in regions if r.kind != "embedding" and str(r.weight.target) not in tables}
    digest = _digest(graph_module, products.values(), (bits, block, zero_point), data)
    cache = MeasurementCache.at(data.cache, digest)
    stored = cache.load(0)
    if stored is None:
        worker = _Worker(products, bits, block, zero_point)
        sweep(graph_module, data.windows, products, worker.visit, progress)
        stored = worker.found
        cache.describe({"version": VERSION, "method": "gptq", "windows": len(data.windows)})
        cache.store(0, stored)
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stored.items():
        region, _, name = key.rpartition("/")
        statistics.setdefault(region, {})[name] = tensor
    return Calibration(digest, len(data.windows), statistics)


def calibrated_weight(
    statistics: Mapping[str, torch.Tensor], bits: int, width: int
) -> QuantizedWeight | None:
    """The weight that calibration found for a region; None if it found none."""
    if "codes" not in statistics:
        return None
    return QuantizedWeight(
        statistics["codes"],
        statistics["scales"],
        statistics.get("zero_points"),
        statistics.get("offsets"),
        bits,
        width,
    )


class _Worker:
    """Quantises each product when the sweep comes to it. Products of one input share its Hessian."""

    def __init__(
        self, products: Mapping[fx.Node, WeightRegion], bits: int, block: int, zero_point: ZeroPoint
    ) -> None:
        self.products = products
        self.format: dict[str, Any] = {"bits": bits, "block": block, "zero_point": zero_point}
        self.found: dict[str, torch.Tensor] = {}
        self._hessian: tuple[fx.Node, torch.Tensor] | None = None

    def visit(self, node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        region = self.products[node]
        source, bias = operands(node)
        places = {
            argument: index for index, argument in enumerate(node.args) if isinstance(argument, fx.Node)
        }
        inputs = [window[places[source]] for window in windows]
        weight = region.stored
        assert weight is not None
        quantized = gptq(weight.float(), self._hessian_of(source, inputs), **self.format)
        for name, tensor in tensors_of(quantized).items():
            if tensor is not None:
                self.found[f"{region.region}/{name}"] = tensor
        dense = quantized.dequantized(weight.dtype)
        biases = [None if bias is None else window[places[bias]] for window in windows]
        return [torch.nn.functional.linear(x, dense, shift) for x, shift in zip(inputs, biases, strict=True)]

    def _hessian_of(self, source: fx.Node, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._hessian is None or self._hessian[0] is not source:
            width = inputs[0].shape[-1]
            total = torch.zeros(width, width)
            for x in inputs:
                rows = x.reshape(-1, width).float()
                total += rows.T @ rows
            self._hessian = (source, total)
        return self._hessian[1]


def _digest(
    graph_module: fx.GraphModule, regions: Any, format_: tuple[object, ...], data: CalibrationData
) -> str:
    names = [region.region for region in regions]
    digest = hashlib.sha256(f"gptq {VERSION} {format_} {names}\n{graph_text(graph_module)}\n".encode())
    tensors = {} if data.model_digest else dict(graph_module.state_dict(keep_vars=True))
    digest.update(data.model_digest.encode())
    for index, window in enumerate(data.windows):
        tensors |= {f"window {index} {name}": tensor for name, tensor in window.items()}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
