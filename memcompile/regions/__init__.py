"""Regions: the parts of a captured graph that rewrites act on."""

from __future__ import annotations

from memcompile.regions.attention import (
    AttentionRegion,
    argument,
    attention_nodes,
    attention_regions,
    read_region,
)
from memcompile.regions.evict import EvictSpec, Scorer
from memcompile.regions.masks import Causal, Mask, Padding, Runtime, SlidingWindow, Unmasked
from memcompile.regions.model import ModelFacts, Refusal, TensorSpec

__all__ = [
    "AttentionRegion", "Causal", "EvictSpec", "Mask", "ModelFacts", "Padding", "Refusal", "Runtime", "Scorer",
    "SlidingWindow", "TensorSpec", "Unmasked", "argument", "attention_nodes", "attention_regions",
    "read_region",
]  # fmt: skip
