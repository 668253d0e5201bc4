"""Which heads of a model stay: scored on calibration text, and ranked over all layers together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcompile.calibrate.collect import CalibrationData
from memcompile.calibrate.sweep import sweep
from memcompile.errors import MemcompileError
from memcompile.passes.weights.heads import HeadsRegion, channels_of
from memcompile.passes.weights.importance import (
    fitted_columns,
    hessian_of,
    inputs_of,
    products_of,
    taylor_scores,
)
from memcompile.passes.weights.structure import Block, addition_of
from memcompile.progress import Progress


def heads_to_keep(
    graph_module: fx.GraphModule,
    regions: Sequence[HeadsRegion],
    sparsity: float,
    *,
    criterion: str,
    refit: bool,
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """The query heads that stay in each region, int64 ascending, and the product that reads them, fitted.

    criterion: "taylor", what taking a unit out is predicted to lose (Michel et al. 2019, arXiv:1905.10650, in
    the squared form of Molchanov et al. 2019, arXiv:1906.10771); "activation", the norm of what a unit adds
    to the residual stream, as a share of the stream's. Both compare across layers as they are: Michel et al.
    divide by the norm of each layer's scores, which loses far more on SmolLM2.

    Raises:
        MemcompileError: MC305, no unit is small enough to go; MC116, the model gives no logits.
    """
    if criterion == "taylor":
        readers = {region.region: region.reader for region in regions}
        columns = {region.region: region.unit_heads * region.head_width for region in regions}
        scores = taylor_scores(graph_module, readers, columns, data, progress)
    else:
        scores = _shares_of_the_stream(graph_module, regions, data, progress)
    kept = choose(scores, {region.region: region.unit_heads for region in regions}, sparsity)
    found = {
        f"{region.region}/queries": channels_of(kept[region.region], region.unit_heads) for region in regions
    }
    if refit:
        found |= _fit(graph_module, regions, found, data, progress)
    return found


def choose(
    scores: Mapping[str, torch.Tensor], unit_heads: Mapping[str, int], sparsity: float
) -> dict[str, list[int]]:
    """The units that stay in each layer when `sparsity` of all query heads goes, least important first.

    scores: of each layer's units; unit_heads: query heads of a unit. Every layer keeps its best unit.

    Raises:
        MemcompileError: MC305, so small a share is no whole unit, or every layer has only one.
    """
    total = sum(len(score) * unit_heads[layer] for layer, score in scores.items())
    budget = round(sparsity * total)
    ranked = []
    for layer, score in scores.items():
        best = int(score.argmax())
        ranked += [
            (float(score[unit]) / unit_heads[layer], layer, unit)
            for unit in range(len(score))
            if unit != best
        ]
    gone = set()
    for _, layer, unit in sorted(ranked, key=lambda one: one[0]):
        if unit_heads[layer] <= budget:
            budget -= unit_heads[layer]
            gone.add((layer, unit))
    if not gone:
        raise MemcompileError(
            "MC305",
            f"weights.prune: sparsity {sparsity} of {total} query heads in {len(scores)} layers is "
            f"{round(sparsity * total)}, and at least {min(unit_heads.values())} go together",
            fix="raise sparsity, or name more layers",
        )
    return {
        layer: [unit for unit in range(len(score)) if (layer, unit) not in gone]
        for layer, score in scores.items()
    }


def _shares_of_the_stream(
    graph_module: fx.GraphModule, regions: Sequence[HeadsRegion], data: CalibrationData, progress: Progress
) -> dict[str, torch.Tensor]:
    """The norm over the text of what each unit adds to the residual stream, by the norm of the stream.

    What stands between the product and the stream, a norm say, is taken to scale all units alike. Without a
    stream, it is the share of what the product gives.
    """
    readers = {region.reader.node: region for region in regions}
    ends: dict[fx.Node, tuple[HeadsRegion, Block]] = {}
    for region in regions:
        if (block := addition_of(region.reader.node)) is not None:
            ends[block.addition] = (region, block)
    found: dict[str, torch.Tensor] = {}

    def visit(node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        if node in ends:
            region, block = ends[node]
            added = _squares(window[1 - block.place] for window in windows)
            sums = [window[0] + window[1] for window in windows]
            found[region.region] *= (added / _squares(sums)) ** 0.5
            return sums
        region = readers[node]
        weight = region.reader.stored
        assert weight is not None
        inputs, biases = inputs_of(node, windows)
        by_unit = weight.float().reshape(len(weight), region.units, -1)
        units = [x.float().reshape(*x.shape[:-1], region.units, -1) for x in inputs]
        outputs = products_of(inputs, biases, weight)
        squares = [
            _squares(x[..., unit, :] @ by_unit[:, unit].T for x in units) for unit in range(region.units)
        ]
        found[region.region] = (torch.tensor(squares, dtype=torch.float64) / _squares(outputs)).sqrt()
        return outputs

    sweep(graph_module, data.windows, {*readers, *ends}, visit, progress)
    return found


def _squares(tensors: Iterable[torch.Tensor]) -> float:
    """The sum of all squares, at least a little."""
    return max(sum(float(x.double().pow(2).sum()) for x in tensors), 1e-30)


def _fit(
    graph_module: fx.GraphModule,
    regions: Sequence[HeadsRegion],
    kept: Mapping[str, torch.Tensor],
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """The products that read the heads that stay, fitted to what they gave with all of them.

    Each layer sees those before it without their heads.
    """
    readers = {region.reader.node: region for region in regions}
    found: dict[str, torch.Tensor] = {}

    def visit(node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        region = readers[node]
        weight = region.reader.stored
        assert weight is not None
        inputs, biases = inputs_of(node, windows)
        columns = channels_of(kept[f"{region.region}/queries"].tolist(), region.head_width)
        if len(columns) == region.reader.width:
            return products_of(inputs, biases, weight)
        fitted = fitted_columns(weight, hessian_of(inputs), columns)
        found[f"{region.region}/out"] = fitted
        return products_of([x[..., columns] for x in inputs], biases, fitted)

    sweep(graph_module, data.windows, readers, visit, progress)
    return found
