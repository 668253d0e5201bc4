"""Many queries: online-softmax attention that visits only the blocks of keys a tile of queries can see.

One program is one tile of BLOCK_M queries of one head. Query head h reads key/value head h // REPEATS where
it lies, so grouped heads repeat nothing in memory. Which blocks to visit is a list made beforehand
(`visits.py`): first the blocks in which every pair is visible, which need no mask, then those with a boundary
in them. A block that is not on the list costs nothing. The scheme is FlashAttention-2's (Dao 2023,
arXiv:2307.08691) over FlexAttention's lists (Dong et al. 2024, arXiv:2412.05496).
"""

from __future__ import annotations

import triton
import triton.language as tl

from memcompile.backends.torch.triton.tile import (
    LOG2_E,
    finish_rows,
    fold_tile,
    product,
    scaled_scores,
    seen_pairs,
)


@triton.jit
def _one_block(
    acc, top, total, query, block, tokens_M, q_pos,
    k, v, k_positions, k_scale_D, mask,
    k_n, v_n, mask_t, mask_n, query_tokens, key_tokens, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr,
    BOUNDARY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Fold one block of BLOCK_N keys into the running output; BOUNDARY: not every pair is visible."""
    store: tl.constexpr = query.dtype
    slots = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_at = k + slots[:, None].to(tl.int64) * k_n + d[None, :]
    v_at = v + slots[:, None].to(tl.int64) * v_n + dv[None, :]
    if BOUNDARY:
        k_pos = tl.load(k_positions + slots, mask=slots < key_tokens, other=-1).to(tl.int32)
        # empty slots may hold anything, NaN included: 0 * NaN would spread it
        held = (k_pos >= 0)[:, None]
        keys = tl.load(k_at, mask=held & (d < D)[None, :], other=0)
        values = tl.load(v_at, mask=held & (dv < DV)[None, :], other=0)
    else:
        keys = tl.load(k_at, mask=(d < D)[None, :], other=0)
        values = tl.load(v_at, mask=(dv < DV)[None, :], other=0)
    if BITS == 8:
        keys = keys.to(tl.float32) * k_scale_D[None, :]
        # exact in every type; the scale of values waits for the end
        values = values.to(tl.float32)
    scores = scaled_scores(product(query, tl.trans(keys.to(store)), WIDE), scale, softcap, SOFTCAP)
    if BOUNDARY:
        allowed = seen_pairs(q_pos, k_pos, CAUSAL, WINDOW, SINKS, BLOCK, STRIDE)
        if MASK != "none":
            inside = (tokens_M < query_tokens)[:, None] & (slots < key_tokens)[None, :]
            at = mask + tokens_M[:, None].to(tl.int64) * mask_t + slots[None, :].to(tl.int64) * mask_n
            given = tl.load(at, mask=inside, other=0)
            if MASK == "bool":
                allowed = allowed & (given != 0)
            else:
                scores += given.to(tl.float32) * LOG2_E
        scores = tl.where(allowed, scores, float("-inf"))
    return fold_tile(acc, top, total, scores, values, store, WIDE)


@triton.jit
def prefill_kernel(
    q, k, v, out, lse, q_positions, k_positions,
    k_scale, v_scale, mask, visits, counts,
    q_b, q_h, q_t, k_b, k_g, k_n, v_b, v_g, v_n,
    q_pos_b, k_pos_b, mask_b, mask_h, mask_t, mask_n, visits_b, visits_h,
    heads, query_tokens, key_tokens, scale, softcap,
    REPEATS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """out [B,H,T,DV] and lse [B,H,T], both contiguous, over the grid (ceil(T / BLOCK_M), B*H).

    visits: int32 [B|1,H|1,tiles,blocks]; counts: int32 [B|1,H|1,tiles,2], blocks without a boundary, blocks
    in all. A stride named x_y is that of tensor x along axis y; a tensor's last axis is contiguous.
    """
    tiles = tl.num_programs(0)
    # late tiles see most keys under a causal mask: they start first, so that the short ones fill the end
    tile = tiles - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    group = head // REPEATS
    tokens_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    inside = tokens_M < query_tokens
    q_at = q + batch * q_b + head * q_h + tokens_M[:, None].to(tl.int64) * q_t + d[None, :]
    query = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0)
    q_pos = tl.load(q_positions + batch * q_pos_b + tokens_M, mask=inside, other=-1).to(tl.int32)
    k_scale_D = d.to(tl.float32)
    if BITS == 8:
        k_scale_D = tl.load(k_scale + group * D + d, mask=d < D, other=0)
    k += batch * k_b + group * k_g
    v += batch * v_b + group * v_g
    k_positions += batch * k_pos_b
    mask += batch * mask_b + head * mask_h
    blocks = tl.cdiv(key_tokens, BLOCK_N)
    row = batch * visits_b + head * visits_h + tile
    visits += row * blocks
    whole = tl.load(counts + row * 2)
    live = tl.load(counts + row * 2 + 1)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # blocks without a boundary, then those with one
    for boundary in tl.static_range(2):
        for i in range(boundary * whole, whole + boundary * (live - whole)):
            acc, top, total = _one_block(
                acc, top, total, query, tl.load(visits + i), tokens_M, q_pos, k, v, k_positions, k_scale_D,
                mask, k_n, v_n, mask_t, mask_n, query_tokens, key_tokens, scale, softcap,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
                CAUSAL, WINDOW, SINKS, BLOCK, STRIDE, SOFTCAP, MASK, BITS, boundary == 1, WIDE,
            )  # fmt: skip
    result, row_lse = finish_rows(acc, top, total)
    if BITS == 8:
        result *= tl.load(v_scale + group * DV + dv, mask=dv < DV, other=0)[None, :]
    first = (batch * heads + head) * query_tokens + tokens_M
    tl.store(
        out + first[:, None] * DV + dv[None, :],
        result.to(out.dtype.element_ty),
        mask=inside[:, None] & (dv < DV)[None, :],
    )
    tl.store(lse + first, row_lse, mask=inside)
