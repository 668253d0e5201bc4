"""What one tile of scores goes through: who may look at whom, soft cap, one step of the online softmax.

Scores are kept in float32 and in units of log2, because the hardware's exponential is 2**x.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def seen_pairs(
    q_positions, k_positions,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """`memcompile.dialect.visible_keys` for one tile: bool [M,N] of positions [M] and [N]; -1 is empty."""
    q = q_positions[:, None]
    p = k_positions[None, :]
    allowed = (p >= 0) & (q >= 0)
    if CAUSAL:
        allowed = allowed & (p <= q)
    if WINDOW > 0:
        if CAUSAL:
            near = q - p < WINDOW
        else:
            near = tl.abs(q - p) < WINDOW
        if SINKS > 0:
            near = near | (p < SINKS)
        if STRIDE > 0:
            near = near | ((p // BLOCK) % STRIDE == 0)
        allowed = allowed & near
    return allowed


@triton.jit
def scaled_scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2 from the products of queries and keys."""
    scores = products * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both infinities
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0))
    return scores * LOG2_E


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a @ b, summed in float32. WIDE widens the operands first, which changes no product of half types.

    float32 goes through the matrix units as three tf32 products ("tf32x3"): one has 11 of float32's 24 bits,
    and plain multiplication ("ieee") is unrolled into more registers than there are and spills kilobytes a
    thread.
    """
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def fold_tile(
    acc,
    top,
    total,
    scores,
    values,
    STORE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Fold scores [M,N] and values [N,D] into the running output, maximum and sum (Milakov & Gimelshein 2018,
    arXiv:1805.02867). `STORE` is the type the weights are rounded to before the product."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet: -inf minus -inf would be NaN
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + product(weights.to(STORE), values.to(STORE), WIDE)
    return acc, new_top, total


@triton.jit
def finish_rows(acc, top, total):
    """Output rows and their natural log-sum-exp; rows that saw nothing give 0 and -inf."""
    nothing = total == 0.0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * LN_2)
    return out, lse
