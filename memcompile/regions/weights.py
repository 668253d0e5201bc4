"""Find the layers of a captured graph whose stored weights a rewrite can change."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.regions.attention import argument, attention_regions

aten: Any = torch.ops.aten
LINEAR = torch.ops.memcompile.quantized_linear.default
EMBEDDING = torch.ops.memcompile.quantized_embedding.default
_VIEWS = (aten.reshape.default, aten.view.default)
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class WeightRegion:
    """A linear layer, or the embedding of the model's tokens.

    layer: the attention layer it belongs to; None for what stands outside of all of them. kind: "head" is the
    product that gives the logits. bits: 0 while the weight is stored as floats.
    """

    node: fx.Node
    region: str
    path: str
    layer: int | None
    kind: Literal["linear", "head", "embedding"]
    rows: int
    width: int
    bits: int

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in,out]."""
        return self.node.target is aten.addmm.default

    @property
    def weight(self) -> fx.Node:
        """The node that reads (or computes) the weight."""
        place = {aten.linear.default: 1, aten.embedding.default: 0, aten.addmm.default: 2}
        weight = self.node.args[place.get(self.node.target, 1)]
        assert isinstance(weight, fx.Node)
        return weight

    @property
    def stored(self) -> torch.Tensor | None:
        """The weight [rows,width], when it is a tensor that the graph stores."""
        if self.weight.op != "get_attr":
            return None
        found: Any = self.weight.graph.owning_module
        for part in str(self.weight.target).split("."):
            found = getattr(found, part)
        assert isinstance(found, torch.Tensor)
        return found.detach().t() if self.transposed else found.detach()


def weight_regions(graph_module: fx.GraphModule) -> list[WeightRegion]:
    """Every linear layer and token embedding of the graph, in graph order; quantised ones too."""
    layers = {region.layer for region in attention_regions(graph_module)}
    nodes = [node for node in graph_module.graph.nodes if _kind(node) is not None]
    products = [node for node in nodes if _kind(node) == "linear"]
    found: list[WeightRegion] = []
    taken: Counter[str] = Counter()
    for node in nodes:
        path = module_path(node)
        name = _name(node, path)
        taken[name] += 1
        region = name if taken[name] == 1 else f"{name}#{taken[name]}"
        layer = layer_of(path, layers)
        kind = _kind(node)
        assert kind is not None
        if layer is None and products and node is products[-1]:
            kind = "head"
        rows, width = _shape(node)
        bits = int(argument(node, "bits")) if node.target in (LINEAR, EMBEDDING) else 0
        found.append(WeightRegion(node, region, path, layer, kind, rows, width, bits))
    return found


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _kind(node: fx.Node) -> Literal["linear", "head", "embedding"] | None:
    if node.op != "call_function":
        return None
    if node.target in (aten.linear.default, LINEAR):
        return "linear"
    if node.target is aten.addmm.default and not node.kwargs:
        return "linear"
    if node.target is EMBEDDING:
        return "embedding"
    if node.target is aten.embedding.default and _reads_tokens(node.args[1]):
        return "embedding"
    return None


def _reads_tokens(index: Any) -> bool:
    """Whether an embedding looks up an input of the model, and not positions."""
    while isinstance(index, fx.Node) and index.target in _VIEWS:
        index = index.args[0]
    return isinstance(index, fx.Node) and index.op == "placeholder" and "position" not in str(index.target)


def _name(node: fx.Node, path: str) -> str:
    """The module's path; a module with several weights of its own adds the weight's name."""
    own = path or node.name
    weight = node.args[{aten.embedding.default: 0, aten.addmm.default: 2}.get(node.target, 1)]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or node.target in (LINEAR, EMBEDDING):
        return str(node.meta.get("weight_region", own))
    last = str(weight.target).rpartition(".")[2]
    return f"{own}.{last.removesuffix('_weight')}" if last.endswith("_weight") else own


def layer_of(path: str, layers: set[int]) -> int | None:
    """The first number in a module's path, when an attention layer has it."""
    found = _INDEX.search(path)
    number = int(found[1]) if found else None
    return number if number in layers else None


def _shape(node: fx.Node) -> tuple[int, int]:
    """Rows (outputs, or tokens) and width (inputs, or channels) of a region's weight."""
    if node.target is LINEAR:
        codes, x = argument(node, "codes").meta["val"], argument(node, "x").meta["val"]
        return int(codes.shape[0]), int(x.shape[-1])
    if node.target is EMBEDDING:
        return int(argument(node, "codes").meta["val"].shape[0]), int(argument(node, "width"))
    place = {aten.linear.default: 1, aten.embedding.default: 0, aten.addmm.default: 2}[node.target]
    weight = node.args[place]
    assert isinstance(weight, fx.Node)
    rows, width = (int(size) for size in weight.meta["val"].shape)
    return (width, rows) if node.target is aten.addmm.default else (rows, width)
