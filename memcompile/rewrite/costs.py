"""Predicted cost of an attention region in a workload, from the dialect's own cost function."""

from __future__ import annotations

from memcompile.dialect import Cost
from memcompile.dialect.attention import attention_cost
from memcompile.regions import AttentionRegion, argument
from memcompile.rewrite.entry import Workload


def decode_cost(
    region: AttentionRegion,
    workload: Workload,
    *,
    held_tokens: int | None = None,
    kv_heads: int | None = None,
    bits: int | None = None,
) -> Cost:
    """Cost of decoding the workload's last token in `region`.

    held_tokens: cached tokens left to look at; None: what the region itself holds. kv_heads: when only some
    of the region's key/value heads are meant. bits: of a cache element; None: the region's own.
    """
    total = workload.prompt_tokens + workload.new_tokens
    held = region_held_tokens(region, workload) if held_tokens is None else min(held_tokens, total)
    groups = region.kv_heads if kv_heads is None else kv_heads
    return attention_cost(
        B=workload.batch,
        T=1,
        S=held,
        H=groups * (region.heads // region.kv_heads),
        G=groups,
        D=region.head_dim,
        bits=region.bits if bits is None else bits,
        element_bytes=argument(region.node, "k").meta["val"].element_size(),
    )


def region_held_tokens(region: AttentionRegion, workload: Workload) -> int:
    """Cached tokens that the region's later queries can still see, at the end of the workload."""
    total = workload.prompt_tokens + workload.new_tokens
    if region.window_tokens is not None:
        return windowed_tokens(total, region.window_tokens, region.sinks, region.block, region.stride)
    if region.evict is not None:
        return region.evict.kept(workload.prompt_tokens) + workload.new_tokens
    return total


def windowed_tokens(total: int, window: int, sinks: int, block: int, stride: int) -> int:
    """How many of `total` tokens a query at the end sees: its window, the sinks, and the strided blocks."""
    past = max(0, total - window)
    seen = set(range(min(sinks, past)))
    if stride:
        for begin in range(0, past, block * stride):
            seen.update(range(begin, min(begin + block, past)))
    return len(seen) + total - past
