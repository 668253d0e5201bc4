"""A program: named graphs over one set of weights, with the state they carry between calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from memcompile.dialect.cache_codes import code_dtype, code_width
from memcompile.regions import EvictSpec, ModelFacts, TensorSpec, ffn_regions

if TYPE_CHECKING:
    from memcompile.program.compress import Compress

PLAIN_GROUP = "full"


@dataclass(frozen=True, slots=True)
class PositionGroup:
    """Regions whose caches hold the same tokens, and so share one table of key positions.

    `window` 0: every cached token stays visible. Otherwise a token is visible within `window`, among the
    first `sinks`, or in every `stride`-th block of `block` tokens. `evict`: what is dropped after prefill.
    """

    name: str
    window: int = 0
    sinks: int = 0
    block: int = 0
    stride: int = 0
    evict: EvictSpec | None = None

    @property
    def input_name(self) -> str:
        return f"positions_{self.name}"


@dataclass(frozen=True, slots=True)
class StateSpec:
    """The key/value cache of one region: [B,kv_heads,S,head_dim] for keys and for values."""

    region: str
    layer: int
    group: str
    heads: int
    kv_heads: int
    head_dim: int
    bits: int
    dtype: torch.dtype
    observe_tokens: int = 0
    # keys of a page whose bounds are kept beside the cache, so that decoding can choose pages; 0: none
    page_tokens: int = 0
    # neurons of this layer's feed-forward part that are counted while a prompt is read; 0: none
    neurons: int = 0

    @property
    def storage_dtype(self) -> torch.dtype:
        return code_dtype(self.bits, self.dtype)

    @property
    def storage_width(self) -> int:
        return code_width(self.bits, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes one token of one sequence takes, keys and values together."""
        return 2 * self.kv_heads * self.storage_width * self.storage_dtype.itemsize

    @property
    def slug(self) -> str:
        return self.region.replace(".", "_")

    def names(self) -> StateNames:
        return StateNames(
            key_in=f"past_key_{self.slug}",
            value_in=f"past_value_{self.slug}",
            observed_in=f"observed_{self.slug}" if self.observe_tokens else None,
            bounds_in=f"bounds_{self.slug}" if self.page_tokens else None,
            neurons_in=f"neurons_{self.slug}" if self.neurons else None,
        )


@dataclass(frozen=True, slots=True)
class StateNames:
    """Placeholder names of a state in the step and compress graphs."""

    key_in: str
    value_in: str
    observed_in: str | None
    bounds_in: str | None
    neurons_in: str | None


@dataclass(frozen=True)
class Program:
    """What a backend lowers.

    `forward` is the whole-sequence graph. A causal model also has `step`, the same function with its state as
    inputs and outputs, and `compress` when the plan evicts tokens after prefill. Placeholders of `step`, in
    order: input_ids [B,T], position_ids [B,T], logit_positions [B,N] (rows whose logits are wanted; negative
    counts from the end), positions_<group> [B,P+T] for each group, past_key/past_value for each state,
    observed_<region> for each state that observes, bounds_<region> for each that chooses pages,
    neurons_<region> [B,F] for each whose layer counts neurons. Outputs: logits [B,N,V], then key and value
    for each state, then observed, bounds and neurons.
    """

    forward: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model: ModelFacts
    step: fx.GraphModule | None = None
    compress: Compress | None = None
    states: tuple[StateSpec, ...] = ()
    groups: tuple[PositionGroup, ...] = ()
    logits_index: int | None = None
    rebuild: Callable[[tuple[Any, ...]], Any] = field(default=lambda values: values)

    @property
    def decodes_alone(self) -> bool:
        """Whether a call of one token computes another thing than one of several."""
        chooses = any(0 < ffn.keep < ffn.neurons for ffn in ffn_regions(self.forward))
        return chooses or any(state.page_tokens for state in self.states)

    def group(self, name: str) -> PositionGroup:
        return next(g for g in self.groups if g.name == name)

    def states_of(self, group: str) -> tuple[StateSpec, ...]:
        return tuple(s for s in self.states if s.group == group)
