"""Run a captured forward graph over calibration data and collect statistics of its attention regions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache
from memcompile.calibrate.statistics import Statistic
from memcompile.errors import MemcompileError
from memcompile.progress import SILENT, Progress
from memcompile.regions import argument, attention_nodes
from memcompile.weights.parameter import LazyParameter

CACHE_VERSION = 1


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """What to run the graph over: one mapping from placeholder name to tensor for each window.

    model_digest: stands for the graph's parameters in the cache key; empty: the parameters are hashed.
    cache: the folder to remember results in; None: the default one.
    """

    windows: tuple[Mapping[str, torch.Tensor], ...]
    model_digest: str = ""
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Statistics by region and name, and the digest of everything they depend on."""

    digest: str
    windows: int
    statistics: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The calibration without its tensors, as the manifest records it."""
        return {"digest": self.digest, "windows": self.windows, "regions": sorted(self.statistics)}


def token_windows(tokens: Sequence[int], window_tokens: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Cut tokens into windows for a causal language model, each from position 0; a short rest is dropped.

    Raises:
        MemcompileError: MC121, there are fewer tokens than one window.
    """
    count = len(tokens) // window_tokens
    if count == 0:
        raise MemcompileError(
            "MC121",
            f"the calibration text has {len(tokens)} tokens, and a window needs {window_tokens}",
            fix="give a longer text in data.calibration",
        )
    ids = torch.as_tensor(list(tokens[: count * window_tokens]), dtype=torch.int64).reshape(
        count, 1, window_tokens
    )
    positions = torch.arange(window_tokens).unsqueeze(0)
    return tuple({"input_ids": row, "position_ids": positions} for row in ids)


def collect(
    graph_module: fx.GraphModule,
    regions: Sequence[str],
    statistic: Statistic,
    data: CalibrationData,
    *,
    graph_key: str,
    progress: Progress = SILENT,
) -> Calibration:
    """Measure `statistic` in the regions called `regions`, over every window of `data`.

    graph_key: stands for the graph's structure in the cache key (its text).
    Only the part of the graph that the regions depend on is run, so no logits are computed.

    Raises:
        MemcompileError: MC107, there are no windows; MC205, a window does not fit the graph's inputs.
    """
    if not data.windows:
        raise MemcompileError(
            "MC107", "data.calibration: needed, and missing", fix="name a text in data.calibration"
        )
    wanted = [n for n in attention_nodes(graph_module) if argument(n, "region") in set(regions)]
    digest = _digest(graph_module, graph_key, [str(argument(n, "region")) for n in wanted], statistic, data)
    cache = MeasurementCache.at(data.cache, digest)
    cache.describe({"version": CACHE_VERSION, "statistic": repr(statistic), "windows": len(data.windows)})
    runner = _Runner(graph_module, wanted, statistic)
    measured: list[Mapping[str, torch.Tensor]] = []
    for index, window in enumerate(data.windows):
        stored = cache.load(index)
        if stored is None:
            stored = dict(runner.measure(window))
            cache.store(index, stored)
        measured.append(stored)
        progress.update(index + 1, len(data.windows))
    return Calibration(digest, len(measured), _joined(measured, statistic))


def _joined(
    measured: Sequence[Mapping[str, torch.Tensor]], statistic: Statistic
) -> dict[str, dict[str, torch.Tensor]]:
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(measured[0]):
        region, _, name = key.rpartition("/")
        joined.setdefault(region, {})[name] = statistic.join(name, torch.stack([m[key] for m in measured]))
    return joined


class _Runner:
    """Runs what the wanted attention nodes depend on, and measures their inputs on the way."""

    def __init__(self, graph_module: fx.GraphModule, wanted: Sequence[fx.Node], statistic: Statistic) -> None:
        self.graph_module = graph_module
        self.wanted = set(wanted)
        self.statistic = statistic
        self.needed = _ancestors([_input(n, name) for n in wanted for name in ("q", "k", "v")])
        self.last_reads = self._last_reads()

    def measure(self, window: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The statistics of one window, named "<region>/<statistic>"."""
        values: dict[fx.Node, Any] = {}
        measured: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for node in self.graph_module.graph.nodes:
                if node in self.wanted:
                    found = self.statistic.measure(*(values[_input(node, name)] for name in ("q", "k", "v")))
                    region = str(argument(node, "region"))
                    measured.update({f"{region}/{name}": tensor for name, tensor in found.items()})
                if node in self.needed:
                    values[node] = self._run(node, values, window)
                for done in self.last_reads.get(node, ()):
                    del values[done]
        return measured

    def _last_reads(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node, the values that nobody after it reads."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph_module.graph.nodes:
            read = set(node.all_input_nodes) if node in self.needed else set()
            if node in self.wanted:
                read |= {_input(node, name) for name in ("q", "k", "v")}
            last.update(dict.fromkeys(read, node))
        freed: dict[fx.Node, list[fx.Node]] = {}
        for value, reader in last.items():
            freed.setdefault(reader, []).append(value)
        return freed

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any], window: Mapping[str, torch.Tensor]) -> Any:
        if node.op == "placeholder":
            if str(node.target) not in window:
                raise MemcompileError(
                    "MC205",
                    f"calibration gives {', '.join(sorted(window))}, but the graph also wants {node.target}",
                    fix="calibrate with the inputs that the model was captured with",
                )
            return window[str(node.target)]
        if node.op == "get_attr":
            found: Any = self.graph_module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        if node.op == "call_module":
            return self.graph_module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _input(node: fx.Node, name: str) -> fx.Node:
    found = argument(node, name)
    assert isinstance(found, fx.Node)
    return found


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _digest(
    graph_module: fx.GraphModule,
    graph_key: str,
    regions: Sequence[str],
    statistic: Statistic,
    data: CalibrationData,
) -> str:
    digest = hashlib.sha256(
        f"calibration {CACHE_VERSION} {statistic!r} {list(regions)}\n{graph_key}\n".encode()
    )
    if data.model_digest:
        digest.update(data.model_digest.encode())
    else:
        for name, tensor in sorted(graph_module.state_dict(keep_vars=True).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            _hash_tensor(digest, tensor)
    for window in data.windows:
        for name, tensor in sorted(window.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            _hash_tensor(digest, tensor)
    return digest.hexdigest()


def _hash_tensor(digest: Any, tensor: torch.Tensor) -> None:
    if isinstance(tensor, LazyParameter):
        # what it stands for says as much as its numbers, and is not read
        digest.update(tensor.expression.digest().encode())
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
