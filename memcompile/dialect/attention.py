"""`memcompile::attention`: softmax attention with explicit state, the one op behind prefill and decode.

Shapes: B batch, T query tokens, S new key tokens, P cached tokens, H query heads, G key/value heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from memcompile.dialect.cache_codes import code_dtype, code_width, dequantize, quantize
from memcompile.dialect.cpu_attention import kernel_attention
from memcompile.dialect.op import (
    Cost,
    DialectOp,
    accumulate_type,
    differentiate_through_definition,
    register,
)
from memcompile.dialect.pages import page_keys
from memcompile.dialect.selection import FEW_QUERIES, select_for_rows

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# the name of torch's own attention among the implementations
SDPA = "sdpa"


def visible_keys(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    causal: bool,
    window: int,
    sinks: int,
    block: int,
    stride: int,
) -> torch.Tensor:
    """Who may look at whom, as bool [B,T,S], from positions [B,T] and [B,S] (-1: padding, empty)."""
    q = query_positions.unsqueeze(-1)
    p = key_positions.unsqueeze(-2)
    allowed = (p >= 0) & (q >= 0)
    if causal:
        allowed = allowed & (p <= q)
    if window > 0:
        near = (q - p < window) if causal else ((q - p).abs() < window)
        if sinks > 0:
            near = near | (p < sinks)
        if stride > 0:
            near = near | ((torch.div(p, block, rounding_mode="floor") % stride) == 0)
        allowed = allowed & near
    return allowed


def append_to_cache(
    new: torch.Tensor, past: torch.Tensor | None, scale: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values to attend over and the next state: past and new keys (or values) on the token axis.

    With `bits` the state holds codes, and what is attended over is what the codes stand for.
    """
    codes = quantize(new, scale, bits) if bits and scale is not None else new
    state = codes if past is None else torch.cat((past, codes), dim=2)
    if bits and scale is not None:
        values = dequantize(state, scale, bits, new.shape[-1]).to(new.dtype)
        # rounding has no slope: gradients pass straight through it (Bengio et al. 2013, arXiv:1308.3432)
        return values + (new - new.detach()) if new.requires_grad and past is None else values, state
    return state, state


def attention_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pattern: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    block: int = 0,
    stride: int = 0,
    softcap: float = 0.0,
    bits: int = 0,
    pattern_block: int = 0,
    pattern_from: int = 0,
    page_tokens: int = 0,
    page_keep: int = 0,
    page_from: int = 0,
    kernel: str = "",
    key_tile: int = 0,
    splits: int = 0,
    region: str = "",
) -> Triple:
    """The meaning of `memcompile::attention`, dense and slow; scores are kept in float32 or wider."""
    keys, k_state = append_to_cache(k, past_k, k_scale, bits)
    values, v_state = append_to_cache(v, past_v, v_scale, bits)
    batch, heads, tokens, width = q.shape
    groups, total = keys.shape[1], keys.shape[2]
    work = accumulate_type(q.dtype)
    if positions is None:
        positions = torch.arange(total, device=q.device).unsqueeze(0)
    q_positions = positions[:, total - tokens :] if causal or window or past_k is not None else None
    if q_positions is None:
        q_positions = torch.zeros((1, tokens), dtype=positions.dtype, device=q.device)
    allowed = visible_keys(
        q_positions, positions, causal=causal, window=window, sinks=sinks, block=block, stride=stride
    ).unsqueeze(1)
    grouped_q = q.to(work).reshape(batch, groups, heads // groups, tokens, width)
    scores = torch.einsum("bgrtd,bgsd->bgrts", grouped_q, keys.to(work)).reshape(batch, heads, tokens, total)
    scores = scores * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            allowed = allowed & mask
        else:
            scores = scores + mask.to(work)
    if pattern is not None:
        chosen = select_for_rows(
            q.to(work),
            keys.to(work),
            positions,
            pattern,
            block=pattern_block,
            begin=pattern_from,
            scale=scale,
        )
        allowed = allowed & chosen
    if bounds is not None and page_tokens:
        paged = page_keys(
            q.to(work), bounds, positions, k_scale,
            page_tokens=page_tokens, keep=page_keep, begin=page_from, bits=bits,
        )  # fmt: skip
        allowed = allowed if paged is None else allowed & paged
    scores = scores.masked_fill(~allowed, float("-inf"))
    # a row that sees nothing is all -inf: its softmax is NaN, its meaning is zero
    weights = torch.softmax(scores, dim=-1).masked_fill(~allowed, 0.0)
    grouped_w = weights.reshape(batch, groups, heads // groups, tokens, total)
    # empty slots may hold anything, NaN included: 0 * NaN would spread it
    empty = (positions < 0).unsqueeze(1).unsqueeze(-1)
    safe_values = values.to(work).masked_fill(empty, 0.0)
    out = torch.einsum("bgrts,bgsd->bgrtd", grouped_w, safe_values).reshape(batch, heads, tokens, v.shape[-1])
    if past_k is None:
        k_state, v_state = k_state[:, :, :0], v_state[:, :, :0]
    return out.to(q.dtype), k_state, v_state


def _by_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
) -> Triple | None:
    """torch's own attention, for a whole prompt or one token after it; None for any other call."""
    if positions is not None and bool((positions < 0).any()):
        return None
    keys, values = k, v
    if past_k is not None and past_v is not None:
        keys, values = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
    tokens, total = q.shape[2], keys.shape[2]
    if causal and tokens not in (1, total):
        return None
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, is_causal=causal and tokens > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if past_k is None:
        keys, values = k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3])
    return out.contiguous(), keys, values


def _by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    pattern: torch.Tensor | None,
    bounds: torch.Tensor | None,
    *,
    bits: int,
    **attributes: Any,
) -> Triple | None:
    """The same by the CPU kernels; None where they do not apply."""
    if q.device.type != "cpu" or k.shape[-1] != v.shape[-1]:
        return None
    keys, values = (
        quantize(new, by, bits) if bits and by is not None else new
        for new, by in ((k, k_scale), (v, v_scale))
    )
    if past_k is not None and past_v is not None:
        keys, values = torch.cat((past_k, keys), dim=2), torch.cat((past_v, values), dim=2)
    placed = attributes["causal"] or attributes["window"] or past_k is not None
    query_positions = None
    if not placed and positions is not None:
        # queries without a place of their own see every key that is there
        query_positions = positions.new_zeros((q.shape[0], q.shape[2]))
    if pattern is not None:
        if q.shape[2] <= FEW_QUERIES or keys.shape[2] <= attributes["pattern_from"]:
            pattern = None
        elif positions is not None and bool((positions < 0).any()):
            # kernels choose by slot, and an empty slot is no key
            return None
    if bounds is not None:
        if q.shape[2] != 1 or keys.shape[2] <= attributes["page_from"]:
            bounds = None
        elif positions is not None and bool((positions < 0).any()):
            return None
    out = kernel_attention(
        q, keys, values, positions=positions, query_positions=query_positions, pattern=pattern, bounds=bounds,
        k_scale=k_scale if bits else None, v_scale=v_scale if bits else None, **attributes,
    )  # fmt: skip
    if out is None:
        return None
    if past_k is None:
        keys, values = keys[:, :, :0].clone(), values[:, :, :0].clone()
    return out, keys, values


@torch.library.custom_op("memcompile::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pattern: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    block: int = 0,
    stride: int = 0,
    softcap: float = 0.0,
    bits: int = 0,
    pattern_block: int = 0,
    pattern_from: int = 0,
    page_tokens: int = 0,
    page_keep: int = 0,
    page_from: int = 0,
    kernel: str = "",
    key_tile: int = 0,
    splits: int = 0,
    region: str = "",
) -> Triple:
    """Attend from `q` [B,H,T,D] over the cache and the new `k`, `v` [B,G,S,D].

    past_k, past_v: state [B,G,P,D] (float, int8 codes, or packed int4 codes); None: a stateless call.
    positions: int64 [B,P+S], of every cached and new key, -1 for padding; the queries are the last T.
        None: 0, 1, 2, ... Queries of a call that is neither causal nor windowed nor stateful have none.
    mask: a mask computed at run time, additive or bool (True: may look), broadcastable to [B,H,T,P+S].
    k_scale, v_scale: float32 [G*D], needed when `bits` is 8 or 4.
    pattern: int32 [H,4], which keys each head chooses when a prompt is read, in blocks of `pattern_block`
        tokens and from more than `pattern_from` keys on (memcompile/dialect/selection.py).
    bounds: of the pages of `page_tokens` keys, the new ones included (memcompile/dialect/pages.py). A call of
        one token then looks at `page_keep` pages only, in rows with more than `page_from` keys.
    kernel, key_tile, splits: what was measured as fastest; they change no result but by rounding. "sdpa" is
        torch's own attention, where it computes the same; else the kernel library.
    Returns the output [B,H,T,D] and the next state of keys and values (empty for a stateless call).
    """
    if kernel == SDPA and not (window or softcap or bits) and all(x is None for x in (mask, pattern, bounds)):
        fast = _by_sdpa(q, k, v, past_k, past_v, positions, scale=scale, causal=causal)
        if fast is not None:
            return fast
    if mask is None and scale > 0:
        fast = _by_kernel(
            q, k, v, past_k, past_v, positions, k_scale, v_scale, pattern, bounds,
            scale=scale, causal=causal, window=window, sinks=sinks, block=block, stride=stride,
            softcap=softcap, bits=bits, pattern_block=pattern_block, pattern_from=pattern_from,
            page_tokens=page_tokens, page_keep=page_keep, page_from=page_from, key_tile=key_tile,
            splits=splits,
        )  # fmt: skip
        if fast is not None:
            return fast
    plain = (
        positions is None
        and mask is None
        and pattern is None
        and window == 0
        and softcap == 0.0
        and past_k is None
    )
    if plain and (not causal or q.shape[2] == k.shape[2]):
        keys, _ = append_to_cache(k, None, k_scale, bits)
        values, _ = append_to_cache(v, None, v_scale, bits)
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        state = code_dtype(bits, k.dtype)
        shape = (k.shape[0], k.shape[1], 0, code_width(bits, k.shape[-1]))
        return out.contiguous(), k.new_empty(shape, dtype=state), v.new_empty(shape, dtype=state)
    out, k_state, v_state = attention_definition(
        q, k, v, past_k, past_v, positions, mask, k_scale, v_scale, pattern, bounds,
        scale=scale, causal=causal, window=window, sinks=sinks, block=block, stride=stride,
        softcap=softcap, bits=bits, pattern_block=pattern_block, pattern_from=pattern_from,
        page_tokens=page_tokens, page_keep=page_keep, page_from=page_from, region=region,
    )  # fmt: skip
    if past_k is None:
        return out, k_state.clone(), v_state.clone()
    return out, k_state, v_state


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pattern: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    block: int = 0,
    stride: int = 0,
    softcap: float = 0.0,
    bits: int = 0,
    pattern_block: int = 0,
    pattern_from: int = 0,
    page_tokens: int = 0,
    page_keep: int = 0,
    page_from: int = 0,
    kernel: str = "",
    key_tile: int = 0,
    splits: int = 0,
    region: str = "",
) -> Triple:
    batch, groups, new, width = k.shape
    dtype = code_dtype(bits, k.dtype)
    cached = 0 if past_k is None else past_k.shape[2] + new
    state = (batch, groups, cached, code_width(bits, width))
    out = q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[-1]))
    return out, k.new_empty(state, dtype=dtype), v.new_empty(state, dtype=dtype)


differentiate_through_definition(attention, attention_definition, tensor_count=11)


def attention_cost(
    *, B: int, T: int, S: int, H: int, G: int, D: int, window: int = 0, sinks: int = 0, bits: int = 0,
    element_bytes: int = 4, causal: bool = True,
) -> Cost:  # fmt: skip
    """Cost of T queries over S keys in all (cached and new): two matrix products over the visible pairs.

    The state is what later queries can still see: window + sinks when there is a window, else S.
    """
    held = min(S, window + sinks) if window else S
    if window:
        pairs = T * held
    elif causal:
        pairs = T * S - T * (T - 1) // 2
    else:
        pairs = T * S
    token_bytes = 2 * G * (D if not bits else D * bits // 8) * (element_bytes if not bits else 1)
    moved = B * (2 * H * T * D * element_bytes + held * token_bytes)
    return Cost(flops=4 * B * H * D * pairs, bytes_moved=moved, state_bytes=B * held * token_bytes)


ATTENTION = register(
    DialectOp("attention", attention_definition, attention_cost, state=("present_k", "present_v"))
)
