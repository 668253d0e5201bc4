"""Which heads of a model stay: scored on calibration text, and ranked over all layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    to its layer's output. Either is divided by the norm of its layer's scores, as Michel et al. do.

    Raises:
        MemcompileError: MC305, no unit is small enough to go; MC116, the model gives no logits.
    """
    if criterion == "taylor":
        readers = {region.region: region.reader for region in regions}
        columns = {region.region: region.unit_heads * region.head_width for region in regions}
        scores = taylor_scores(graph_module, readers, columns, data, progress)
    else:
        scores = _norms_of_outputs(graph_module, regions, data, progress)
    kept = choose(scores, {region.region: region.unit_heads for region in regions}, sparsity)
    found = {
        f"{region.region}/queries": channels_of(kept[region.region], region.unit_heads) for region in regions
    }
    if refit:
        found |= _fit(graph_module, regions, found, data, progress)
    return found


def choose(
    scores: Mapping[str, torch.Tensor], unit_heads: Mapping[str, int], sparsity: float, normalise: bool = True
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
        importance = (
            score / score.double().norm().clamp(min=torch.finfo(torch.float64).tiny) if normalise else score
        )
        best = int(score.argmax())
        ranked += [
            (float(importance[unit]) / unit_heads[layer], layer, unit)
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


def _norms_of_outputs(
    graph_module: fx.GraphModule, regions: Sequence[HeadsRegion], data: CalibrationData, progress: Progress
) -> dict[str, torch.Tensor]:
    """The norm over the text of what each unit alone gives through the product that reads it."""
    readers = {region.reader.node: region for region in regions}
    found: dict[str, torch.Tensor] = {}

    def visit(node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        region = readers[node]
        weight = region.reader.stored
        assert weight is not None
        inputs, biases = inputs_of(node, windows)
        by_unit = weight.float().unflatten(-1, (region.units, -1))
        squares = torch.zeros(region.units, dtype=torch.float64)
        for x in inputs:
            flat = x.flatten(0, -2).float().unflatten(-1, (region.units, -1))
            for unit in range(region.units):
                squares[unit] += (flat[:, unit] @ by_unit[:, unit].T).double().pow(2).sum()
        found[region.region] = squares.sqrt()
        return products_of(inputs, biases, weight)

    sweep(graph_module, data.windows, readers, visit, progress)
    return found


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
