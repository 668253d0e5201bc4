"""Regions: the parts of a captured graph that rewrites act on."""

from __future__ import annotations

from memcompile.regions.attention import (
    AttentionRegion,
    argument,
    attention_nodes,
    attention_regions,
    read_region,
)
from memcompile.regions.copying import copy_graph
from memcompile.regions.evict import EvictSpec, Scorer
from memcompile.regions.ffn import FfnRegion, ffn_regions
from memcompile.regions.masks import Causal, Mask, Padding, Runtime, SlidingWindow, Unmasked
from memcompile.regions.model import ModelFacts, Refusal, Region, TensorSpec
from memcompile.regions.weights import WeightRegion, weight_regions

__all__ = [
    "AttentionRegion", "Causal", "EvictSpec", "FfnRegion", "Mask", "ModelFacts", "Padding", "Refusal",
    "Region", "Runtime", "Scorer", "SlidingWindow", "TensorSpec", "Unmasked", "WeightRegion", "argument",
    "attention_nodes", "attention_regions", "copy_graph", "ffn_regions", "read_region", "weight_regions",
]  # fmt: skip
