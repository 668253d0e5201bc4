"""What pruning measures on calibration text: inputs, gradients, and how far the predictions move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache
from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.calibrate.sweep import sweep
from memcompile.errors import MemcompileError
from memcompile.passes.weights.calibrated import by_region, digest_of
from memcompile.passes.weights.sensitivity import WINDOWS, squared_gradient, visit_gradients
from memcompile.passes.weights.structure import ChannelsRegion, LayerRegion, head_of
from memcompile.progress import Progress
from memcompile.regions import WeightRegion
from memcompile.weights.place import operands
from memcompile.weights.prune import knee, pack_mask

VERSION: Final = 1
# sparsities at which the search for a knee looks
KNEE_SPARSITIES: Final = tuple(step / 20 for step in range(19))
KNEE_WINDOWS: Final = 2
# of the mean of the Hessian's diagonal, added to it before a product is fitted again
DAMP: Final = 0.01

Masker = Callable[[torch.Tensor], torch.Tensor]


def remembered(
    graph_module: fx.GraphModule,
    settings: Sequence[object],
    data: CalibrationData,
    measure: Callable[[], Mapping[str, torch.Tensor]],
) -> Calibration:
    """What `measure` gives, "<region>/<name>" to tensor: measured once for a graph, its weights and text.

    Raises:
        MemcompileError: MC107, there are no windows.
    """
    if not data.windows:
        raise MemcompileError(
            "MC107", "data.calibration: needed, and missing", fix="name a text in data.calibration"
        )
    digest = digest_of(graph_module, ("prune", VERSION, *settings), data)
    cache = MeasurementCache.at(data.cache, digest)
    stored = cache.load(0)
    if stored is None:
        stored = dict(measure())
        cache.describe({"version": VERSION, "statistic": str(settings), "windows": len(data.windows)})
        cache.store(0, stored)
    return Calibration(digest, len(data.windows), by_region(stored))


def masks_by_inputs(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    mask: Masker,
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Masks by |weight| times the norm of its input (Sun et al. 2024, "Wanda", arXiv:2306.11695).

    Each product sees those before it pruned.
    """
    products = {region.node: region for region in regions}
    found: dict[str, torch.Tensor] = {}

    def visit(node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        region = products[node]
        inputs, biases = inputs_of(node, windows)
        norm = sum(x.flatten(0, -2).float().pow(2).sum(0) for x in inputs)
        assert isinstance(norm, torch.Tensor)
        weight = region.stored
        assert weight is not None
        keep = mask(weight.float().abs() * norm.sqrt())
        found[f"{region.region}/mask"] = pack_mask(keep)
        return products_of(inputs, biases, weight * keep)

    sweep(graph_module, data.windows, products, visit, progress)
    return found


def masks_by_gradients(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    mask: Masker,
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Masks by what taking a weight out is predicted to lose: half its square in the Fisher metric."""
    squares: dict[str, torch.Tensor] = {}

    def add(region: WeightRegion, x: torch.Tensor, gradient: torch.Tensor) -> None:
        found = squared_gradient(region, x, gradient)
        squares[region.region] = squares[region.region] + found if region.region in squares else found

    windows = data.windows[:WINDOWS]
    for index, window in enumerate(windows):
        visit_gradients(graph_module, regions, window, add, seed=index)
        progress.update(index + 1, len(windows))
    found = {}
    for region in regions:
        weight = region.stored
        assert weight is not None
        found[f"{region.region}/mask"] = pack_mask(mask(squares[region.region] * weight.float().pow(2)))
    return found


def essential_sparsity(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    pruned: Callable[[torch.Tensor, float], torch.Tensor],
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """The knee of the divergence from the whole model's predictions as sparsity rises; one for all regions.

    pruned: a weight at a sparsity. Gives the knee and the curve [sparsities,2] for every region.
    """
    head = head_of(
        graph_module, "the knee is looked for in a model's logits", fix="set knee: false and a sparsity"
    )
    windows = data.windows[:KNEE_WINDOWS]
    wanted = [_predictions(graph_module, head.node, window, {}) for window in windows]
    losses = []
    for index, sparsity in enumerate(KNEE_SPARSITIES):
        changed = {region.weight: (region, sparsity) for region in regions}
        values = {
            node: lambda given=given: _transposed_back(given[0], pruned(given[0].stored, given[1]))
            for node, given in changed.items()
        }
        found = [_predictions(graph_module, head.node, window, values) for window in windows]
        losses.append(
            sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(wanted, found, strict=True))
            / len(windows)
        )
        progress.update(index + 1, len(KNEE_SPARSITIES))
    curve = torch.tensor(list(zip(KNEE_SPARSITIES, losses, strict=True)), dtype=torch.float64)
    chosen = torch.tensor(knee(KNEE_SPARSITIES, losses), dtype=torch.float64)
    return {
        f"{region.region}/{name}": tensor.clone()
        for region in regions
        for name, tensor in (("sparsity", chosen), ("curve", curve))
    }


def _transposed_back(region: WeightRegion, weight: torch.Tensor) -> torch.Tensor:
    return weight.t() if region.transposed else weight


def _predictions(
    graph_module: fx.GraphModule,
    head: fx.Node,
    window: Mapping[str, torch.Tensor],
    values: Mapping[fx.Node, Callable[[], torch.Tensor]],
) -> torch.Tensor:
    """Log-probabilities [tokens,V], with other values for some stored tensors."""
    runner = _Replaced(graph_module, head, values)
    with torch.no_grad():
        runner.run(*[window[str(n.target)] for n in graph_module.graph.nodes if n.op == "placeholder"])
    return torch.log_softmax(runner.logits.float().flatten(0, -2), dim=-1)


class _Replaced(fx.Interpreter):
    """Runs a graph with other values for some of its stored tensors."""

    logits: torch.Tensor

    def __init__(
        self,
        graph_module: fx.GraphModule,
        head: fx.Node,
        values: Mapping[fx.Node, Callable[[], torch.Tensor]],
    ) -> None:
        super().__init__(graph_module)
        self.head, self.values = head, values

    def run_node(self, n: fx.Node) -> Any:
        if n in self.values:
            return self.values[n]()
        value = super().run_node(n)
        if n is self.head:
            self.logits = value
        return value


def channels_to_keep(
    graph_module: fx.GraphModule,
    regions: Sequence[ChannelsRegion],
    count: Callable[[int], int],
    *,
    criterion: str,
    refit: bool,
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """The channels that stay in each block, sorted, and the product that reads them, fitted again.

    criterion: "magnitude", the norms of a channel's weights multiplied; "activation", the norm of the channel
    over the text times that of its column; "taylor", what taking it out is predicted to lose (Molchanov et
    al. 2019, arXiv:1906.10771, by drawn tokens). refit: the columns that stay take over what they can, in the
    least squares of the outputs on the text.
    """
    readers = {region.region: region.down for region in regions}
    scores = taylor_scores(graph_module, readers, {}, data, progress) if criterion == "taylor" else {}
    blocks = {region.node: region for region in regions}
    found: dict[str, torch.Tensor] = {}

    def visit(node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        region = blocks[node]
        inputs, biases = inputs_of(node, windows)
        down = region.down.stored
        assert down is not None
        hessian = hessian_of(inputs)
        if criterion == "magnitude":
            score = magnitude_of_channels(region)
        elif criterion == "activation":
            score = hessian.diagonal().sqrt() * down.float().norm(dim=0)
        else:
            score = scores[region.region]
        keep = score.topk(count(region.channels)).indices.sort().values
        fitted = down.float()[:, keep]
        if refit:
            fitted = fitted_columns(down, hessian, keep)
        found[f"{region.region}/keep"] = keep
        found[f"{region.region}/down"] = fitted.contiguous()
        return products_of([x[..., keep] for x in inputs], biases, fitted)

    sweep(graph_module, data.windows, blocks, visit, progress)
    return found


def magnitude_of_channels(region: ChannelsRegion) -> torch.Tensor:
    """The norms of each channel's weights, multiplied: scaling one and dividing another changes nothing."""
    down = region.down.stored
    assert down is not None
    score: torch.Tensor = down.float().norm(dim=0)
    for maker in region.makers:
        weight = maker.stored
        assert weight is not None
        score = score * weight.float().norm(dim=1)
    return score


def hessian_of(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of x xᵀ over the tokens of a product's inputs, float32 [K,K]."""
    hessian = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1])
    for x in inputs:
        flat = x.flatten(0, -2).float()
        hessian += flat.T @ flat
    return hessian


def fitted_columns(weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The columns `keep` of a weight [N,K], fitted to the whole product in least squares; float32."""
    within = hessian[keep][:, keep].double()
    within.diagonal().add_(DAMP * within.diagonal().mean().clamp(min=1e-12))
    fitted: torch.Tensor = torch.linalg.solve(within, (weight.double() @ hessian[:, keep].double()).T).T
    return fitted.float().contiguous()


def taylor_scores(
    graph_module: fx.GraphModule,
    readers: Mapping[str, WeightRegion],
    unit_columns: Mapping[str, int],
    data: CalibrationData,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """What the loss of columns of products is predicted to lose, first order squared, by drawn tokens.

    readers: the products by name; unit_columns: how many neighbouring columns go together, 1 if not given.
    """
    names = {reader.region: name for name, reader in readers.items()}
    scores: dict[str, torch.Tensor] = {}

    def add(reader: WeightRegion, x: torch.Tensor, gradient: torch.Tensor) -> None:
        weight, name = reader.stored, names[reader.region]
        assert weight is not None
        by_column = (gradient.flatten(0, -2).float() @ weight.float()) * x.flatten(0, -2).float()
        by_unit = by_column.reshape(len(by_column), -1, unit_columns.get(name, 1)).sum(-1).pow(2).sum(0)
        scores[name] = scores[name] + by_unit if name in scores else by_unit

    windows = data.windows[:WINDOWS]
    for index, window in enumerate(windows):
        visit_gradients(graph_module, list(readers.values()), window, add, seed=index)
        progress.update(index + 1, len(windows))
    return scores


def influence_of_layers(
    graph_module: fx.GraphModule, regions: Sequence[LayerRegion], data: CalibrationData, progress: Progress
) -> dict[str, torch.Tensor]:
    """How much each layer turns its stream: 1 - mean cosine of what comes in and goes out.

    "Block influence" of Men et al. 2024, "ShortGPT", arXiv:2403.03853.
    """
    ends = {region.node: region for region in regions}
    starts = {region.blocks[0].stream for region in regions}
    sums = {region.region: [0.0, 0] for region in regions}
    for index, window in enumerate(data.windows):
        runner = _Streams(graph_module, starts | set(ends))
        with torch.no_grad():
            runner.run(*[window[str(n.target)] for n in graph_module.graph.nodes if n.op == "placeholder"])
        for end, region in ends.items():
            before, after = runner.seen[region.blocks[0].stream], runner.seen[end]
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[region.region][0] += float(cosine.sum())
            sums[region.region][1] += cosine.numel()
        progress.update(index + 1, len(data.windows))
    return {
        f"{name}/influence": torch.tensor(1 - total / count, dtype=torch.float64)
        for name, (total, count) in sums.items()
    }


class _Streams(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.wanted = wanted
        self.seen: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = value
        return value


def inputs_of(node: fx.Node, windows: Sequence[tuple[Any, ...]]) -> tuple[list[torch.Tensor], list[Any]]:
    """Inputs and biases of a product in every window."""
    source, bias = operands(node)
    inputs = [window[node.args.index(source)] for window in windows]
    return inputs, [None if bias is None else window[node.args.index(bias)] for window in windows]


def products_of(
    inputs: Sequence[torch.Tensor], biases: Sequence[Any], weight: torch.Tensor
) -> list[torch.Tensor]:
    return [
        torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        for x, bias in zip(inputs, biases, strict=True)
    ]
