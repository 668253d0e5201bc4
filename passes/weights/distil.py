"""Recovery: what was left of a model learns to predict what the whole model predicted.

The loss is the divergence of the rewritten model's predictions from the original's on calibration text
(Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531, at temperature 1),
minimised with AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Only what is trained is in memory as a
whole: other weights are read when they are needed, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache
from memcompile.calibrate.collect import CalibrationData
from memcompile.errors import MemcompileError
from memcompile.passes.weights.calibrated import digest_of
from memcompile.passes.weights.structure import NORMS, head_of
from memcompile.progress import Progress
from memcompile.regions import WeightRegion, argument, weight_regions
from memcompile.rewrite.emit import Emit
from memcompile.weights.parameter import LazyParameter, evaluated
from memcompile.weights.place import operands

aten: Any = torch.ops.aten
VERSION: Final = 2
# steps after which what was trained is written down, to go on from there
CHECKPOINT_STEPS: Final = 20
# of so many windows one is kept back, to measure on
HELD_OUT: Final = 8
# gradients are scaled down to this norm
GRADIENT_NORM: Final = 1.0
_SUFFIX: Final = "_trained"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long, how fast and what is trained.

    scales: those of quantised linear layers' blocks, each as a factor of what it was, so that one learning
    rate serves all (step sizes are trained in the last phase of Chen et al. 2024, EfficientQAT,
    arXiv:2407.11062).
    """

    steps: int
    learning_rate: float
    parameters: Literal["norms", "pruned", "all", "scales"]


def distil(
    original: fx.GraphModule,
    graph_module: fx.GraphModule,
    recipe: Recipe,
    data: CalibrationData,
    progress: Progress,
    emit: Emit,
) -> None:
    """Train `graph_module` to the predictions of `original`; zeros of its matrices stay zeros.

    Every step reads one window; the last windows are kept back (unless there is only one), and the divergence
    on them, before and after, is recorded as a decision. If it did not fall, the weights stay as they were.
    The same data and weights give the same result; a run that was stopped goes on from its last checkpoint in
    the calibration cache.

    Raises:
        MemcompileError: MC116, the model gives no logits; MC305, there is nothing to train.
    """
    names = _trained(graph_module, recipe.parameters, emit)
    held = max(1, len(data.windows) // HELD_OUT)
    windows = data.windows[:-held] or data.windows
    teacher = _Runner(original, {})
    student = _Student(graph_module, names, factors=recipe.parameters == "scales")
    settings = ("distil", VERSION, recipe, names, digest_of(original, (), data))
    # what the rewritten weights are is not in a digest of the model
    rewritten = replace(data, model_digest="")
    cache = MeasurementCache.at(data.cache, digest_of(graph_module, settings, rewritten))
    cache.describe({"version": VERSION, "statistic": repr(recipe), "windows": len(data.windows)})
    before = _mean(_divergence(teacher, student.runner, window) for window in data.windows[-held:])
    student.train(recipe, windows, teacher, cache, progress)
    after = _mean(_divergence(teacher, student.runner, window) for window in data.windows[-held:])
    told = (
        f"{recipe.steps} steps on {len(names)} tensors ({student.count} numbers): the divergence from the "
        f"original was {before:.4g} nats a token, and is {after:.4g}"
    )
    if not after < before:
        emit.decide(f"{told}; the weights stay as they were")
        return
    emit.decide(told)
    for name, tensor in student.tensors().items():
        _replace(graph_module, name, tensor, emit)


def _mean(losses: Iterator[torch.Tensor]) -> float:
    with torch.no_grad():
        found = [float(loss) for loss in losses]
    return sum(found) / len(found)


class _Student:
    """The tensors that are trained, as floats of their own, and the graph that runs with them.

    factors: what is trained are factors of their numbers.
    """

    def __init__(self, graph_module: fx.GraphModule, names: Sequence[str], *, factors: bool) -> None:
        self._types = {name: _read(graph_module, name).dtype for name in names}
        values = {name: evaluated(_read(graph_module, name)).detach().float().clone() for name in names}
        # `_times`: what a trained tensor is multiplied by to be the graph's
        if factors:
            self._times, values = values, {name: torch.ones_like(value) for name, value in values.items()}
        else:
            # what is zero in a matrix was pruned: no gradient reaches it
            self._times = {name: value != 0 for name, value in values.items() if value.ndim > 1}
        self._leaves = {name: value.requires_grad_() for name, value in values.items()}
        self.count = sum(value.numel() for value in values.values())
        self.runner = _Runner(graph_module, {name: self._maker(name) for name in names})

    def _maker(self, name: str) -> Callable[[], torch.Tensor]:
        leaf, times, dtype = self._leaves[name], self._times.get(name), self._types[name]
        return lambda: (leaf if times is None else leaf * times).to(dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was trained, in the types it came in."""
        with torch.no_grad():
            return {name: self._maker(name)().clone() for name in self._leaves}

    def train(
        self,
        recipe: Recipe,
        windows: Sequence[Mapping[str, torch.Tensor]],
        teacher: _Runner,
        cache: MeasurementCache,
        progress: Progress,
    ) -> None:
        """Take the recipe's steps, from the last checkpoint on."""
        leaves = list(self._leaves.values())
        optimizer = torch.optim.AdamW(leaves, lr=recipe.learning_rate)
        first = self._resume(optimizer, cache)
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (1 - step / recipe.steps)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                torch.autograd.backward(_divergence(teacher, self.runner, windows[step % len(windows)]))
            torch.nn.utils.clip_grad_norm_(leaves, GRADIENT_NORM)
            optimizer.step()
            done = step + 1
            if done % CHECKPOINT_STEPS == 0 or done == recipe.steps:
                self._store(optimizer, done, cache)
            progress.update(done, recipe.steps)

    def _store(self, optimizer: torch.optim.Optimizer, done: int, cache: MeasurementCache) -> None:
        found = {"step": torch.tensor(done)}
        for name, leaf in self._leaves.items():
            found[f"value.{name}"] = leaf.detach()
            for part, tensor in optimizer.state[leaf].items():
                found[f"{part}.{name}"] = tensor
        cache.store(0, found)

    def _resume(self, optimizer: torch.optim.Optimizer, cache: MeasurementCache) -> int:
        stored = cache.load(0)
        if stored is None:
            return 0
        for name, leaf in self._leaves.items():
            leaf.data.copy_(stored[f"value.{name}"])
            optimizer.state[leaf] = {
                part: stored[f"{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq")
            }
        return int(stored["step"])


def _divergence(teacher: _Runner, student: _Runner, window: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The mean over tokens of KL(teacher, student), in nats."""
    with torch.no_grad():
        wanted = torch.log_softmax(teacher.logits(window).float().flatten(0, -2), -1)
    found = torch.log_softmax(student.logits(window).float().flatten(0, -2), -1)
    loss = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
    return loss / len(wanted)


class _Runner(fx.Interpreter):
    """Runs a graph up to its logits, with other values for some of its stored tensors."""

    def __init__(
        self, graph_module: fx.GraphModule, values: Mapping[str, Callable[[], torch.Tensor]]
    ) -> None:
        super().__init__(graph_module)
        self._values = values
        self._wanted = _logits(graph_module)
        self._found: torch.Tensor

    def logits(self, window: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [B,T,V] of a window."""
        self.run(*[window[str(n.target)] for n in self.graph.nodes if n.op == "placeholder"])
        found = self._found
        del self._found
        return found

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            if str(n.target) in self._values:
                return self._values[str(n.target)]()
            value = super().run_node(n)
            # a weight on disk stays there until a product reads it
            lazy = isinstance(value, LazyParameter)
            return value if lazy or not isinstance(value, torch.Tensor) else value.detach()
        value = _product_on_disk(self, n)
        if value is None:
            value = super().run_node(n)
        if n is self._wanted:
            self._found = value
        return value


def _product_on_disk(runner: fx.Interpreter, node: fx.Node) -> torch.Tensor | None:
    """A product whose weight is on disk; None for anything else."""
    if node.target not in (aten.linear.default, aten.addmm.default):
        return None
    transposed = node.target is aten.addmm.default
    given = runner.fetch_args_kwargs_from_env(node)[0]
    weight = given[2 if transposed else 1]
    if not isinstance(weight, LazyParameter):
        return None
    x, bias = (None if one is None else runner.env[one] for one in operands(node))
    bias = bias if bias is None else evaluated(bias)
    product: torch.Tensor = _ProductOnDisk.apply(x, bias, weight, transposed)  # type: ignore[no-untyped-call]
    return product


class _ProductOnDisk(torch.autograd.Function):
    """x Wᵀ + b that keeps no W for its backward pass, but reads it again; W itself takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: Any, transposed: bool) -> Any:
        ctx.weight, ctx.transposed = weight, transposed
        return torch.nn.functional.linear(x, _rows(weight, transposed), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        x = gradient @ _rows(ctx.weight, ctx.transposed) if ctx.needs_input_grad[0] else None
        bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return x, bias, None, None


def _rows(weight: LazyParameter, transposed: bool) -> torch.Tensor:
    whole = evaluated(weight)
    return whole.t() if transposed else whole


def _logits(graph_module: fx.GraphModule) -> fx.Node:
    """The output that holds the logits; the product that gives them, if they leave in another shape."""
    head = head_of(graph_module, "recovery compares a model's logits", fix="set recover: none")
    outputs = next(n for n in graph_module.graph.nodes if n.op == "output").all_input_nodes
    wide = [n for n in outputs if (v := n.meta["val"]).is_floating_point() and v.shape[-1] == head.rows]
    return wide[0] if wide else head.node


def _trained(graph_module: fx.GraphModule, parameters: str, emit: Emit) -> list[str]:
    """The stored tensors that are trained, by name, in graph order."""
    wanted: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.target in NORMS and parameters in ("norms", "all"):
            wanted |= {str(n.target) for one in node.all_input_nodes[1:] for n in _stored(one)}
    regions = weight_regions(graph_module) if parameters in ("all", "scales") else []
    for region in regions:
        if region.kind == "linear" and parameters == "scales" and region.bits:
            wanted.add(str(argument(region.node, "scales").target))
        elif region.kind == "linear" and parameters == "all" and not region.bits:
            wanted |= _own(region)
    if parameters in ("pruned", "all"):
        wanted |= {
            e.node for e in emit.journal.entries if e.action == "stored" and e.pass_name == emit.pass_name
        }
    names = dict.fromkeys(
        str(n.target)
        for n in graph_module.graph.nodes
        if n.op == "get_attr" and str(n.target) in wanted and n.meta["val"].is_floating_point()
    )
    if not names:
        raise MemcompileError(
            "MC305",
            f"{emit.pass_name}: recover trains {parameters}: there are none, so nothing would be trained",
            fix="train others, or set recover: none",
        )
    return list(names)


def _own(region: WeightRegion) -> set[str]:
    """The tensors that a product reads besides its input."""
    x, _ = operands(region.node)
    return {str(n.target) for one in region.node.all_input_nodes if one is not x for n in _stored(one)}


def _stored(node: fx.Node) -> Iterator[fx.Node]:
    """The stored tensors that a value is computed from."""
    if node.op == "get_attr":
        yield node
    for one in node.all_input_nodes:
        yield from _stored(one)


def _read(graph_module: fx.GraphModule, name: str) -> torch.Tensor:
    found: Any = graph_module
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, torch.Tensor)
    return found


def _replace(graph_module: fx.GraphModule, name: str, tensor: torch.Tensor, emit: Emit) -> None:
    """Let whatever reads a stored tensor read another one."""
    readers = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target == name]
    stored = emit.buffer(f"{name.removesuffix(_SUFFIX)}{_SUFFIX}", tensor, before=readers[0])
    for reader in readers:
        emit.replace_uses(reader, stored)
        emit.erase(reader)
