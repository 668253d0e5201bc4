"""One or few queries over a long cache: the keys are split over programs, and partial results merged.

One program is one split of the keys of one key/value head. The query heads that share it, and the few query
tokens, are the rows of one tile, so every key and value is read once from memory, which is what decoding
costs. Keys that no row can see are not read. The split is Flash-Decoding's (Dao et al. 2023); int8 codes
become numbers in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memcompile.backends.torch.triton.tile import (
    LN_2,
    LOG2_E,
    finish_rows,
    fold_tile,
    product,
    scaled_scores,
    seen_pairs,
)


@triton.jit
def decode_kernel(
    q, k, v, partial, partial_lse, q_positions, k_positions, slots,
    k_scale, v_scale,
    q_b, q_h, q_t, k_b, k_g, k_n, v_b, v_g, v_n,
    q_pos_b, k_pos_b, slots_b, slots_g,
    batches, groups, query_tokens, key_tokens, split_tokens, scale, softcap,
    REPEATS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, CHOSEN: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """partial [splits,B,H,T,DV] and partial_lse [splits,B,H,T], float32, over the grid (splits, B*G).

    slots: with CHOSEN the slots to attend over, int [B|1,G|1,key_tokens], -1 for none; key_tokens counts
    them. Row r*T + t of the tile is query token t of the r-th head that shares the key/value head.
    """
    split = tl.program_id(0)
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    used = rows < REPEATS * query_tokens
    head = group * REPEATS + rows // query_tokens
    token = rows % query_tokens
    q_at = q + batch * q_b + (head * q_h)[:, None] + (token * q_t)[:, None] + d[None, :]
    query = tl.load(q_at, mask=used[:, None] & (d < D)[None, :], other=0)
    store: tl.constexpr = query.dtype
    q_pos = tl.load(q_positions + batch * q_pos_b + token, mask=used, other=-1).to(tl.int32)
    k_scale_D = d.to(tl.float32)
    if BITS == 8:
        k_scale_D = tl.load(k_scale + group * D + d, mask=d < D, other=0)
    k += batch * k_b + group * k_g
    v += batch * v_b + group * v_g
    k_positions += batch * k_pos_b
    slots += batch * slots_b + group * slots_g

    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, key_tokens)
    for first in range(begin, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        held = slot < end
        if CHOSEN:
            slot = tl.load(slots + slot, mask=held, other=-1).to(tl.int32)
            held = slot >= 0
        k_pos = tl.load(k_positions + slot, mask=held, other=-1).to(tl.int32)
        allowed = seen_pairs(q_pos, k_pos, CAUSAL, WINDOW, SINKS, BLOCK, STRIDE)
        # what no row sees is not read: no traffic for it, and nothing of an empty slot gets in
        wanted = tl.max(allowed.to(tl.int32), 0) > 0
        at = slot[:, None].to(tl.int64)
        keys = tl.load(k + at * k_n + d[None, :], mask=wanted[:, None] & (d < D)[None, :], other=0)
        values = tl.load(v + at * v_n + dv[None, :], mask=wanted[:, None] & (dv < DV)[None, :], other=0)
        if BITS == 8:
            keys = keys.to(tl.float32) * k_scale_D[None, :]
            values = values.to(tl.float32)
        scores = scaled_scores(product(query, tl.trans(keys.to(store)), WIDE), scale, softcap, SOFTCAP)
        scores = tl.where(allowed, scores, float("-inf"))
        acc, top, total = fold_tile(acc, top, total, scores, values, store, WIDE)
    result, row_lse = finish_rows(acc, top, total)
    if BITS == 8:
        result *= tl.load(v_scale + group * DV + dv, mask=dv < DV, other=0)[None, :]
    row = ((split * batches + batch) * groups * REPEATS + head) * query_tokens + token
    tl.store(partial + row[:, None] * DV + dv[None, :], result, mask=used[:, None] & (dv < DV)[None, :])
    tl.store(partial_lse + row, row_lse, mask=used)


@triton.jit
def merge_kernel(
    partial, partial_lse, out, lse, splits, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr,
) -> None:  # fmt: skip
    """One softmax out of several over disjoint keys: partial [splits,rows,DV] and lse [splits,rows], one row
    a program.

    out = sum exp(lse_i) partial_i / sum exp(lse_i), and its log-sum-exp. Rows that saw nothing give 0 and
    -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for split in range(splits):
        at = row + split * rows
        here = tl.load(partial_lse + at) * LOG2_E
        new_top = tl.maximum(top, here)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(here - base)
        acc = acc * shrink + weight * tl.load(partial + at * DV + dv, mask=dv < DV, other=0).to(tl.float32)
        total = total * shrink + weight
        top = new_top
    nothing = total == 0.0
    result = acc / tl.where(nothing, 1.0, total)
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
    tl.store(
        lse + row, tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * LN_2)
    )
