"""Find the attention regions of a captured graph and read their facts off the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.regions.evict import EvictSpec
from memcompile.regions.masks import Causal, Mask, Padding, Runtime, SlidingWindow, Unmasked

ATTENTION = torch.ops.memcompile.attention.default


@dataclass(frozen=True)
class AttentionRegion:
    """One `memcompile::attention` node and what is known of it.

    `kv_head_ids` are the model's key/value heads this node serves: all of them unless a pass split the layer.
    """

    node: fx.Node
    layer: int
    path: str
    region: str
    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask
    window_tokens: int | None
    sinks: int
    block: int
    stride: int
    bits: int
    softcap: float
    evict: EvictSpec | None
    kv_head_ids: tuple[int, ...]
    # keys of a page, where decoding chooses pages; else 0
    page_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The region as `memcompile inspect --json` prints it."""
        return {
            "kind": "attention",
            "layer": self.layer,
            "path": self.path,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "mask": self.mask.kind,
            "window_tokens": self.window_tokens,
        }


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The value of a dialect node's schema argument, wherever it was passed."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    if name in node.kwargs:
        return node.kwargs[name]
    for index, declared in enumerate(schema):
        if declared.name == name:
            if index < len(node.args):
                return node.args[index]
            return declared.default_value if declared.has_default_value() else default
    raise KeyError(name)


def attention_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Every attention node, in graph order."""
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target is ATTENTION]


def attention_regions(graph_module: fx.GraphModule) -> list[AttentionRegion]:
    """Every attention region, in graph order."""
    return [read_region(node) for node in attention_nodes(graph_module)]


def read_region(node: fx.Node) -> AttentionRegion:
    """Read the facts of one attention node; needs fake values in `meta["val"]` of its q and k."""
    q, k = (argument(node, name).meta["val"] for name in ("q", "k"))
    window = int(argument(node, "window"))
    kv_heads = int(k.shape[1])
    return AttentionRegion(
        node=node,
        layer=int(node.meta.get("layer", 0)),
        path=str(node.meta.get("path", "")),
        region=str(argument(node, "region")),
        heads=int(q.shape[1]),
        kv_heads=kv_heads,
        head_dim=int(q.shape[3]),
        mask=_mask(node, window),
        window_tokens=window or None,
        sinks=int(argument(node, "sinks")),
        block=int(argument(node, "block")),
        stride=int(argument(node, "stride")),
        bits=int(argument(node, "bits")),
        softcap=float(argument(node, "softcap")),
        evict=node.meta.get("evict"),
        kv_head_ids=tuple(node.meta.get("kv_head_ids", range(kv_heads))),
        page_tokens=int(argument(node, "page_tokens")),
    )


def _mask(node: fx.Node, window: int) -> Mask:
    if argument(node, "mask") is not None:
        return Runtime()
    if window:
        return SlidingWindow(window)
    if argument(node, "causal"):
        return Causal()
    return Padding() if argument(node, "positions") is not None else Unmasked()
