"""How much rounding each weight moves the model's predictions: one backward pass a window, once.

The divergence that a small change of weights makes is half its square in the Fisher metric. Errors of
rounding are as good as independent, so the metric's diagonal is enough: with G the gradient of the likelihood
of tokens drawn from the model's own predictions, the divergence of a window is half the sum of G² times the
error² (LeCun et al. 1990, "Optimal Brain Damage"; used so in Kim et al. 2024, SqueezeLLM, arXiv:2306.07629).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache
from memcompile.calibrate.collect import CalibrationData
from memcompile.errors import MemcompileError
from memcompile.passes.weights.calibrated import digest_of
from memcompile.passes.weights.structure import head_of
from memcompile.progress import Progress
from memcompile.regions import WeightRegion, weight_regions
from memcompile.weights.place import operands

VERSION: Final = 1
# windows that are enough: the metric is a mean over their tokens
WINDOWS: Final = 8

# the weight [N,K] that a change leaves of a region's
Change = Callable[[WeightRegion], torch.Tensor]


def measure_sensitivity(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    changes: Mapping[str, Change],
    settings: Sequence[object],
    data: CalibrationData,
    progress: Progress,
) -> tuple[str, dict[str, torch.Tensor]]:
    """What each change of each region's weight alone loses, in nats a token; and the measurement's digest.

    Gives, by region, float64 [changes] in the order of `changes`.

    Raises:
        MemcompileError: MC107, there are no windows; MC116, the model gives no logits.
    """
    if not data.windows:
        raise MemcompileError(
            "MC107", "data.calibration: needed, and missing", fix="name a text in data.calibration"
        )
    names = [region.region for region in regions]
    digest = digest_of(graph_module, ("sensitivity", VERSION, *settings, list(changes), names), data)
    cache = MeasurementCache.at(data.cache, digest)
    windows = data.windows[:WINDOWS]
    cache.describe({"version": VERSION, "statistic": "sensitivity of weights", "windows": len(windows)})
    total = {name: torch.zeros(len(changes), dtype=torch.float64) for name in names}
    for index, window in enumerate(windows):
        found = cache.load(index)
        if found is None:
            found = _measure(graph_module, regions, list(changes.values()), window, seed=index)
            cache.store(index, found)
        for name in names:
            total[name] += found[name] / len(windows)
        progress.update(index + 1, len(windows))
    return digest, total


def _measure(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    changes: Sequence[Change],
    window: Mapping[str, torch.Tensor],
    seed: int,
) -> dict[str, torch.Tensor]:
    losses = {region.region: torch.zeros(len(changes), dtype=torch.float64) for region in regions}

    def add(region: WeightRegion, x: torch.Tensor, gradient: torch.Tensor) -> None:
        weight = region.stored
        assert weight is not None
        squares = squared_gradient(region, x, gradient)
        for index, change in enumerate(changes):
            error = (change(region) - weight.float()).pow_(2)
            losses[region.region][index] += float((squares * error).sum(dtype=torch.float64))

    tokens = visit_gradients(graph_module, regions, window, add, seed=seed)
    return {name: loss / (2 * tokens) for name, loss in losses.items()}


# a region, its input (of an embedding, the ids), and the likelihood's gradient by its output
Visit = Callable[[WeightRegion, torch.Tensor, torch.Tensor], None]


def squared_gradient(region: WeightRegion, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The square of the likelihood's gradient by each weight of a region, [N,K]."""
    rows = gradient.flatten(0, -2).float()
    if region.kind == "embedding":
        return torch.zeros(region.rows, region.width).index_add_(0, x.flatten(), rows).pow_(2)
    return (rows.T @ x.flatten(0, -2).float()).pow_(2)


def visit_gradients(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    window: Mapping[str, torch.Tensor],
    visit: Visit,
    *,
    seed: int,
) -> int:
    """Call `visit` for each region with the gradient of the likelihood of drawn tokens; gives their count.

    The tokens are drawn from the model's own predictions in the window, with that seed.

    Raises:
        MemcompileError: MC116, the model gives no logits.
    """
    head = head_of(
        graph_module,
        "the change of a model's logits was asked for",
        fix="of weights.quantize, name bits by layers and modules in several entries; of weights.prune, "
        "take criterion magnitude or activation",
    )
    runner = _Runner(graph_module, regions, visit, head.node)
    arguments = [window[str(n.target)] for n in graph_module.graph.nodes if n.op == "placeholder"]
    with torch.enable_grad():
        runner.run(*arguments)
        log = torch.log_softmax(runner.logits.float().flatten(0, -2), dim=-1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(log.detach().exp(), 1, generator=generator)
        likelihood = log.gather(1, drawn).sum()
    torch.autograd.grad(likelihood, runner.root)
    return drawn.numel()


class _Runner(fx.Interpreter):
    """Runs the graph with gradients of what products give; weights themselves take none."""

    logits: torch.Tensor

    def __init__(
        self, graph_module: fx.GraphModule, regions: Sequence[WeightRegion], visit: Visit, head: fx.Node
    ) -> None:
        super().__init__(graph_module)
        self.regions = {region.node: region for region in regions}
        self.visit = visit
        self.head = head
        self.root: list[torch.Tensor] = []
        # quantised or not
        self.tables = {region.node for region in weight_regions(graph_module) if region.kind == "embedding"}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, torch.Tensor):
            return value
        if n.op == "get_attr":
            return value.detach() if value.requires_grad else value
        if n.op == "call_function" and value.is_floating_point():
            if n in self.tables and not value.requires_grad:
                value = value.detach().requires_grad_()
                self.root.append(value)
            region = self.regions.get(n)
            if region is not None and value.requires_grad:
                given = self.fetch_args_kwargs_from_env(n)[0]
                source = n.args[1] if region.kind == "embedding" else operands(n)[0]
                x = given[n.args.index(source)].detach()
                value.register_hook(  # type: ignore[no-untyped-call]
                    lambda g, region=region, x=x: self.visit(region, x, g.detach())
                )
        if n is self.head:
            self.logits = value
        return value
