"""Quantise weights on calibration data: one sweep, each layer seeing those before it quantised."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache
from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.calibrate.sweep import sweep
from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.errors import MemcompileError
from memcompile.progress import Progress
from memcompile.regions import WeightRegion, weight_regions
from memcompile.rewrite.fingerprint import graph_text
from memcompile.weights.clip import clipped
from memcompile.weights.codebook import codebook, quantize_without_data
from memcompile.weights.gptq import gptq, gptq_codebook
from memcompile.weights.methods import ZeroPoint
from memcompile.weights.parameter import LazyParameter, evaluated
from memcompile.weights.place import operands
from memcompile.weights.scaling import EXPONENTS, Inputs, ScaleInputs, search_scale

VERSION: Final = 3
aten: Any = torch.ops.aten
_PRODUCTS: Final = (aten.mul.Tensor, operator.mul)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights become codes, where calibration data decides about it.

    bits: by region. exponent: None, it is searched. clip: GPTQ's grids span the best share of each block.
    spread_errors: codes of tables are found as GPTQ's are.
    """

    bits: Mapping[str, int]
    block: int
    zero_point: ZeroPoint
    method: str
    clip: bool
    spread_errors: bool
    scale_inputs: ScaleInputs
    exponent: float | None
    shift_inputs: bool
    int8_activations: bool

    def rounded(self, weight: torch.Tensor, bits: int) -> QuantizedWeight:
        """The weight rounded without data: how scales are compared."""
        return quantize_without_data(
            weight, bits=bits, block=self.block, zero_point=self.zero_point, method=self.method
        )

    def quantized(self, weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> QuantizedWeight:
        """The weight by the recipe's method."""
        format_: dict[str, Any] = {"bits": bits, "block": self.block, "zero_point": self.zero_point}
        if self.method == "gptq":
            return gptq(weight, hessian, clip=self.clip, **format_)
        if self.method == "clip":
            return clipped(weight, hessian, **format_)
        if self.method == "kmeans" and self.spread_errors:
            return gptq_codebook(weight, hessian, bits=bits, block=self.block)
        if self.method == "kmeans":
            return codebook(weight, bits=bits, block=self.block, moments=hessian.diagonal())
        return self.rounded(weight, bits)


def calibrate_codes(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    recipe: Recipe,
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
    digest = digest_of(graph_module, ("codes", VERSION, recipe, [r.region for r in products.values()]), data)
    cache = MeasurementCache.at(data.cache, digest)
    stored = cache.load(0)
    if stored is None:
        worker = _Worker(graph_module, products, recipe)
        sweep(graph_module, data.windows, products, worker.visit, progress)
        stored = worker.found
        cache.describe({"version": VERSION, "method": recipe.method, "windows": len(data.windows)})
        cache.store(0, stored)
    return Calibration(digest, len(data.windows), by_region(stored))


def by_region(stored: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors called "<region>/<name>", by region and name."""
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stored.items():
        region, _, name = key.rpartition("/")
        statistics.setdefault(region, {})[name] = tensor
    return statistics


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
        statistics.get("table"),
    )


@dataclass(frozen=True)
class _Group:
    """Products of one input: what they share. scale [K] divides the input; folded: its maker does that."""

    source: fx.Node
    inputs: Inputs
    hessian: torch.Tensor
    scale: torch.Tensor | None
    folded: bool


class _Worker:
    """Quantises each product when the sweep comes to it. Products of one input share Hessian and scale."""

    def __init__(
        self, graph_module: fx.GraphModule, products: Mapping[fx.Node, WeightRegion], recipe: Recipe
    ) -> None:
        self.products = products
        self.recipe = recipe
        self.found: dict[str, torch.Tensor] = {}
        self._group: _Group | None = None
        every = weight_regions(graph_module)
        self._uses = Counter(str(region.weight.target) for region in every if not region.bits)

    def visit(self, node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        region = self.products[node]
        source, bias = operands(node)
        places = {
            argument: index for index, argument in enumerate(node.args) if isinstance(argument, fx.Node)
        }
        inputs = [window[places[source]] for window in windows]
        biases = [None if bias is None else window[places[bias]] for window in windows]
        if self._group is None or self._group.source is not source:
            self._group = self._new_group(source, inputs)
        group, stored = self._group, region.stored
        assert stored is not None
        # what is found is stored at once, so that nothing of it may be lazy
        weight = evaluated(stored)
        scale, shift = group.scale, group.inputs.shift
        scaled = weight.float() if scale is None else weight.float() * scale
        quantized = self.recipe.quantized(scaled, group.hessian, self.recipe.bits[region.region])
        for name, tensor in quantized.tensors().items():
            self.found[f"{region.region}/{name}"] = tensor
        if scale is not None and not group.folded:
            self.found[f"{region.region}/input_factor"] = 1 / scale
        dense = quantized.dequantized(torch.float32)
        dense = dense if scale is None else dense / scale
        if shift is not None:
            constant = weight.float() @ shift
            constant = constant if biases[0] is None else constant + biases[0].float()
            self.found[f"{region.region}/input_shift"] = shift.clone()
            self.found[f"{region.region}/bias"] = constant
            # the inputs here are not shifted: W'(x - z) + b = W'x + (b - W'z)
            biases = [constant - dense @ shift] * len(windows)
        return [
            torch.nn.functional.linear(x, dense.to(x.dtype), None if b is None else b.to(x.dtype))
            for x, b in zip(inputs, biases, strict=True)
        ]

    def _new_group(self, source: fx.Node, windows: Sequence[torch.Tensor]) -> _Group:
        recipe = self.recipe
        members = [r for r in self.products.values() if operands(r.node)[0] is source]
        # a weight that several products share has one set of codes, which can follow one scale only
        free = all(self._uses[str(member.weight.target)] == 1 for member in members)
        inputs = Inputs.of(windows, shift=recipe.shift_inputs and free)
        if recipe.scale_inputs == "none" or not free:
            return _Group(source, inputs, inputs.hessian, None, False)
        weights = [member.stored.float() for member in members if member.stored is not None]
        bits = [recipe.bits[member.region] for member in members]
        scale, _ = search_scale(
            inputs,
            weights,
            recipe.scale_inputs,
            EXPONENTS if recipe.exponent is None else (recipe.exponent,),
            lambda index, weight: recipe.rounded(weight, bits[index]).dequantized(),
            recipe.block if recipe.int8_activations else None,
        )
        folded = self._fold(source, {m.node for m in members}, scale) if inputs.shift is None else False
        return _Group(source, inputs, inputs.hessian / torch.outer(scale, scale), scale, folded)

    def _fold(self, source: fx.Node, members: set[fx.Node], scale: torch.Tensor) -> bool:
        """Divide the rows of the product that makes one factor of the input: `gate * up` by `up`.

        A row's factor goes into the scales of its blocks, so its codes stay.
        """
        if source.target not in _PRODUCTS or set(source.users) != members:
            return False
        for maker in reversed(source.all_input_nodes):
            region = self.products.get(maker)
            if region is None or set(maker.users) != {source} or operands(maker)[1] is not None:
                continue
            name = region.region
            if f"{name}/codes" not in self.found or f"{name}/bias" in self.found:
                continue
            for part in ("scales", "offsets"):
                if f"{name}/{part}" in self.found:
                    self.found[f"{name}/{part}"] = self.found[f"{name}/{part}"] / scale.unsqueeze(-1)
            return True
        return False


def digest_of(graph_module: fx.GraphModule, settings: Iterable[object], data: CalibrationData) -> str:
    """What a measurement depends on: the settings, the graph, its weights and the windows."""
    digest = hashlib.sha256(f"{list(settings)}\n{graph_text(graph_module)}\n".encode())
    tensors = {} if data.model_digest else dict(graph_module.state_dict(keep_vars=True))
    digest.update(data.model_digest.encode())
    for index, window in enumerate(data.windows):
        tensors |= {f"window {index} {name}": tensor for name, tensor in window.items()}
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, LazyParameter):
            digest.update(f"{name} {tensor.expression.digest()}".encode())
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
