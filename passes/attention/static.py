"""`attention.static`: who may see whom, fixed before the model runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Final

import torch
from pydantic import Field, field_validator, model_validator
from torch import fx

from memcompile.dialect import Cost
from memcompile.errors import MemcompileError
from memcompile.regions import AttentionRegion, Refusal, Runtime, argument
from memcompile.rewrite.costs import decode_cost, windowed_tokens
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset
from memcompile.rewrite.selectors import Site, parse_layers

UNLIMITED: Final = 2**30


class StaticConfig(PassConfig):
    """What a windowed head sees: its last tokens, the first ones, and every so many blocks in between."""

    window_tokens: int = Field(ge=1, le=UNLIMITED, description="last tokens a query sees, itself included")
    sink_tokens: int = Field(default=0, ge=0, le=UNLIMITED, description="first tokens every query sees")
    block_tokens: int = Field(
        default=0, ge=0, le=UNLIMITED, description="length of the strided blocks; 0: none"
    )
    block_stride: int = Field(
        default=0,
        ge=0,
        le=UNLIMITED,
        description="every this many blocks one stays visible, from the first on",
    )
    full_layers: str | None = Field(
        default=None, description='layers that keep full attention, written as in `layers`: "33%-67%"'
    )

    @field_validator("full_layers")
    @classmethod
    def _is_a_selector(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_layers(value)
            except MemcompileError as error:
                raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _blocks_have_a_stride(self) -> StaticConfig:
        if bool(self.block_tokens) != bool(self.block_stride):
            raise ValueError(
                f"block_tokens is {self.block_tokens} and block_stride is {self.block_stride}: give both "
                "or none"
            )
        return self


@dataclass(frozen=True, slots=True)
class StaticFacts:
    """The visibility to set, and the model's key/value heads to set it for; None: all the region serves."""

    window: int
    sinks: int
    block: int
    stride: int
    heads: tuple[int, ...] | None
    dropped: str = ""

    def arguments(self) -> dict[str, int]:
        return {"window": self.window, "sinks": self.sinks, "block": self.block, "stride": self.stride}


class StaticAttention(Pass[AttentionRegion, StaticConfig, StaticFacts]):
    """Let attention heads see only a window of recent tokens, the first tokens, and strided blocks.

    Rewrites:  causal attention regions, per layer, or per key/value head with `heads` (those listed are
               windowed, the others stay full: the region becomes two, and the order of heads is restored).
    Needs:     a mask that is proven causal. A window of the model's own (Mistral, Gemma) is intersected,
               never widened; where it does not reach the sinks or blocks, they are left out.
    Refuses:   masks computed at run time, attention that is not causal, query heads that split a group,
               regions whose own window is already as narrow.
    Loses:     what lies outside of window, sinks and blocks, for the heads concerned, from the first layer
               on.
    Costs:     no extra work; the cache of a windowed head holds sinks + window tokens (and the strided
               blocks) instead of all, whatever the prompt. Positions stay true: keys are not rotated again.
    Identity:  window_tokens at least prompt and new tokens together.
    Presets:   streaming_llm (Xiao et al. 2023), longgen (Ge et al. 2024), masformer (Zhang et al. 2023)
    """

    name: ClassVar[str] = "attention.static"
    Config: ClassVar[type[StaticConfig]] = StaticConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"whole_cache", "float_cache"}),
        after=frozenset({"kept_heads"}),
        provides=frozenset({"visibility"}),
    )
    takes_heads: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "streaming_llm": Preset(
            {"window_tokens": 2000, "sink_tokens": 4},
            "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453",
            "Attention sinks and a rolling window in every layer; the paper's 4 sinks and its code's "
            "2,000 recent tokens. The original numbers positions by cache slot; here they stay true, so a "
            "prompt must still fit the model's positions.",
        ),
        "longgen": Preset(
            {"window_tokens": 1024, "sink_tokens": 64, "full_layers": "33%-67%"},
            "Ge et al. 2024, A Little Goes a Long Way: Efficient Long Context Training and Inference with "
            "Partial Contexts, arXiv:2410.01485",
            "The middle third of the layers keeps full attention; the layers before and after it see "
            "sinks and a window. Add block_tokens and block_stride (and lower window_tokens) for the "
            "variant with strided blocks. The method fine-tunes the rewritten model; the window of 1,024 "
            "and the 64 sinks are defaults of this preset, not the paper's.",
        ),
        "masformer": Preset(
            {"window_tokens": 1024, "full_layers": "0%-33%"},
            "Zhang et al. 2023, Efficient Long-Range Transformers: You Need to Attend More, but Not "
            "Necessarily at Every Layer, arXiv:2310.12442",
            "Full attention in a few layers (here the lowest third), a window without sinks in all "
            "others. The method trains the rewritten model; without training, add sink_tokens. The "
            "paper's local attention is block-sparse or a window of about this span; the window of 1,024 "
            "is a default of this preset.",
        ),
    }

    def identity(self) -> StaticConfig:
        return StaticConfig(window_tokens=UNLIMITED)

    def budgets(self) -> tuple[StaticConfig, StaticConfig]:
        return StaticConfig(window_tokens=1), StaticConfig(
            window_tokens=UNLIMITED, sink_tokens=UNLIMITED, block_tokens=1, block_stride=1
        )

    def layers(self, config: StaticConfig, sites: Sequence[Site]) -> frozenset[int]:
        every = frozenset(site.layer for site in sites)
        if config.full_layers is None:
            return every
        full = parse_layers(config.full_layers)
        # a share of a very shallow model may be no layer at all
        if all(not part.term.layers(sites) for part in full.terms if not part.negated) and "%" in full.text:
            return every
        return every - full.resolve(sites)

    def changes_nothing(self, config: StaticConfig, workload: Workload) -> str | None:
        total = workload.prompt_tokens + workload.new_tokens
        if config.window_tokens < total:
            return None
        return (
            f"window_tokens is {config.window_tokens}, and the workload has {total} tokens "
            f"({workload.prompt_tokens} of prompt and {workload.new_tokens} new), so every token sees "
            "every one before it"
        )

    def check(
        self, region: AttentionRegion, config: StaticConfig, context: Context = NO_CONTEXT
    ) -> StaticFacts | Refusal:
        if isinstance(region.mask, Runtime):
            return self.refuse(
                region, "its mask is computed at run time, so nothing is proven about who sees whom"
            )
        if not argument(region.node, "causal"):
            return self.refuse(region, f"its mask is {region.mask.kind}, and a window needs causal attention")
        if region.evict is not None:
            return self.refuse(region, "its cache is evicted after prefill; set windows first")
        if region.bits:
            return self.refuse(
                region, f"its cache is already quantised to {region.bits} bits; set windows first"
            )
        heads = _heads_to_split(region, context.heads)
        if heads is not None and _state_is_used(region.node):
            return self.refuse(
                region, "its state is already threaded through the graph, so heads cannot be split"
            )
        return self._intersected(region, config, heads)

    def _intersected(
        self, region: AttentionRegion, config: StaticConfig, heads: tuple[int, ...] | None
    ) -> StaticFacts | Refusal:
        wanted = StaticFacts(
            config.window_tokens, config.sink_tokens, config.block_tokens, config.block_stride, heads
        )
        if region.window_tokens is None:
            return wanted
        same_blocks = (region.block, region.stride) == (wanted.block, wanted.stride)
        if region.stride and wanted.stride and not same_blocks:
            return self.refuse(
                region,
                f"it has strided blocks of {region.block} tokens, one in {region.stride}, which do not "
                f"combine with blocks of {wanted.block}, one in {wanted.stride}",
            )
        narrowed = StaticFacts(
            min(region.window_tokens, wanted.window),
            min(region.sinks, wanted.sinks),
            wanted.block if same_blocks else 0,
            wanted.stride if same_blocks else 0,
            heads,
            dropped=_dropped(region, wanted),
        )
        own = {
            "window": region.window_tokens,
            "sinks": region.sinks,
            "block": region.block,
            "stride": region.stride,
        }
        if narrowed.arguments() == own:
            return self.refuse(
                region, f"it already sees no more than a window of {region.window_tokens} tokens"
            )
        return narrowed

    def rewrite(self, region: AttentionRegion, facts: StaticFacts, emit: Emit) -> None:
        if facts.dropped:
            emit.decide(facts.dropped)
        if facts.heads is None:
            emit.update(region.node, **facts.arguments())
        else:
            _split_heads(region, facts, emit)

    def cost(self, region: AttentionRegion, facts: StaticFacts, workload: Workload) -> Cost:
        total = workload.prompt_tokens + workload.new_tokens
        held = windowed_tokens(total, facts.window, facts.sinks, facts.block, facts.stride)
        if facts.heads is None:
            return decode_cost(region, workload, held_tokens=held)
        windowed = decode_cost(region, workload, held_tokens=held, kv_heads=len(facts.heads))
        return windowed + decode_cost(region, workload, kv_heads=region.kv_heads - len(facts.heads))


def _heads_to_split(region: AttentionRegion, heads: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The heads to window, None when they are all the region has."""
    return None if heads is None or set(heads) == set(region.kv_head_ids) else heads


def _dropped(region: AttentionRegion, wanted: StaticFacts) -> str:
    """What of the wanted visibility the model's own window does not allow."""
    parts = []
    if wanted.sinks > region.sinks:
        parts.append(f"sinks beyond the first {region.sinks} tokens")
    if wanted.stride and not region.stride:
        parts.append("strided blocks")
    if not parts:
        return ""
    left_out = " and ".join(parts)
    return f"left out {left_out}: the model's own window of {region.window_tokens} does not reach them"


def _state_is_used(node: fx.Node) -> bool:
    if argument(node, "past_k") is not None:
        return True
    return any(_selects(user, 1) or _selects(user, 2) for user in node.users if user.users)


def _selects(user: fx.Node, index: int) -> bool:
    return user.target is operator.getitem and bool(user.args[1] == index)


def _split_heads(region: AttentionRegion, facts: StaticFacts, emit: Emit) -> None:
    """Make two regions of one: `<region>.full` and `<region>.window`; then put the heads back in order."""
    node, group = region.node, region.heads // region.kv_heads
    assert facts.heads is not None
    windowed = [i for i, head in enumerate(region.kv_head_ids) if head in facts.heads]
    full = [i for i, head in enumerate(region.kv_head_ids) if head not in facts.heads]
    parts: dict[int, tuple[fx.Node, int]] = {}
    for name, members, extra in (("full", full, {}), ("window", windowed, facts.arguments())):
        attended = _attend(region, name, members, extra, emit)
        out = emit.getitem(attended, 0, before=node)
        parts.update({head: (out, slot) for slot, head in enumerate(members)})
    # consecutive heads that lie side by side in one part are taken together
    runs: list[list[int]] = []
    for head in range(region.kv_heads):
        part, slot = parts[head]
        if runs and parts[runs[-1][-1]] == (part, slot - 1):
            runs[-1].append(head)
        else:
            runs.append([head])
    pieces = []
    for run in runs:
        part, first = parts[run[0]]
        pieces.append(_slice(part, first * group, (first + len(run)) * group, node, emit))
    whole = emit.call(torch.ops.aten.cat.default, pieces, 1, before=node, like=node)
    for user in list(node.users):
        if _selects(user, 0):
            emit.replace_uses(user, whole)
        emit.erase(user)
    emit.erase(node)


def _attend(
    region: AttentionRegion, name: str, members: Sequence[int], extra: Mapping[str, Any], emit: Emit
) -> fx.Node:
    """An attention node over the key/value heads `members` (places within the region)."""
    node, group = region.node, region.heads // region.kv_heads
    queries = _take(argument(node, "q"), members, group, node, emit)
    keys, values = (_take(argument(node, tensor), members, 1, node, emit) for tensor in ("k", "v"))
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    kept = {key: value for key, value in given.items() if key not in ("q", "k", "v", "region")}
    made = emit.call(
        torch.ops.memcompile.attention.default,
        queries,
        keys,
        values,
        before=node,
        like=node,
        **{**kept, **extra, "region": f"{region.region}.{name}"},
    )
    emit.mark(made, "kv_head_ids", tuple(region.kv_head_ids[member] for member in members))
    return made


def _take(tensor: fx.Node, members: Sequence[int], group: int, before: fx.Node, emit: Emit) -> fx.Node:
    """The heads of `members` of a tensor [B,heads,...], `group` heads each."""
    pieces = []
    for _, run in groupby(enumerate(members), key=lambda pair: pair[1] - pair[0]):
        numbers = [member for _, member in run]
        pieces.append(_slice(tensor, numbers[0] * group, (numbers[-1] + 1) * group, before, emit))
    if len(pieces) == 1:
        return pieces[0]
    return emit.call(torch.ops.aten.cat.default, pieces, 1, before=before, like=before)


def _slice(tensor: fx.Node, begin: int, end: int, before: fx.Node, emit: Emit) -> fx.Node:
    if begin == 0 and end == tensor.meta["val"].shape[1]:
        return tensor
    return emit.call(torch.ops.aten.slice.Tensor, tensor, 1, begin, end, before=before, like=before)
