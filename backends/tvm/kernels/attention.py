"""`memcompile::attention` with a cache, for CPUs: appends in place, then online softmax over key blocks.

Queries of all heads that share a key/value head are rows of one tile, so a key is read once for them and
nothing is repeated (grouped-query attention; Ainslie et al. 2023, arXiv:2305.13245). The softmax is online
(Milakov & Gimelshein 2018, arXiv:1805.02867). A block of keys that no row of the tile may see is skipped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

from tvm.script import tirx as T

from memcompile.backends.tvm.kernels.arithmetic import LANES, OPAQUE, all_of, any_of, exp

LOWEST: Final = -1e30  # below every score; finite, so that differences are never NaN
LAST: Final = 2**31 - 1
STORAGE: Final = {0: "float32", 8: "int8", 4: "uint8"}


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How the work is cut; the results do not depend on it but for the order of sums.

    keys: of a block, a multiple of 16. rows: of the register tile. tile_rows: rows (tokens x heads of a
    group) that share a block of keys.
    """

    keys: int = 64
    rows: int = 4
    tile_rows: int = 24


DEFAULT_TILES: Final = AttentionTiles()


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """What an attention kernel is made for; see `memcompile::attention` for the meanings."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    scale: float
    causal: bool = True
    window: int = 0
    sinks: int = 0
    block: int = 0
    stride: int = 0
    softcap: float = 0.0
    bits: int = 0
    pattern_block: int = 0
    pattern_from: int = 0

    @property
    def stored(self) -> tuple[int, int]:
        """Elements a token takes in the caches of one head: keys and values."""
        if self.bits == 4:
            return (self.width + 1) // 2, (self.value_width + 1) // 2
        return self.width, self.value_width

    def visible(self, query: Any, key: Any) -> Any:
        """Whether a query position may see a key position (-1: empty)."""
        conditions = [key >= 0, query >= 0]
        if self.causal:
            conditions.append(key <= query)
        if self.window:
            distance = query - key if self.causal else T.max(query - key, key - query)
            near = [distance < self.window]
            if self.sinks:
                near.append(key < self.sinks)
            if self.stride:
                near.append(T.floormod(T.floordiv(key, self.block), self.stride) == 0)
            conditions.append(any_of(*near))
        return all_of(*conditions)

    def hidden(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> Any:
        """Whether keys in a range are hidden from all queries in a range; `last_key` -1: there are none."""
        reasons = [last_key < 0]
        if self.causal:
            reasons.append(first_key > last_query)
        if self.window and not self.stride:
            passed = [first_query - last_key >= self.window]
            if self.sinks:
                passed.append(first_key >= self.sinks)
            reasons.append(all_of(*passed))
        return any_of(*reasons)

    def capped(self, score: Any) -> Any:
        """`softcap * tanh(score / softcap)`, by way of e^2x."""
        if not self.softcap:
            return score
        power = exp(score * T.float32(2.0 / self.softcap))
        return T.float32(self.softcap) * (T.float32(1) - T.float32(2) / (power + T.float32(1)))

    def code(self, value: Any, scale: Any) -> Any:
        """The integer code of a value, in the range of `bits`."""
        low, high = (-128, 127) if self.bits == 8 else (-8, 7)
        return T.max(T.min(T.nearbyint(value / scale), T.float32(high)), T.float32(low))

    def pair(self, new: Any, scale: Any, batch: Any, group: Any, token: Any, byte: Any, width: int) -> Any:
        """Two 4-bit codes in a byte: channel 2 * `byte` low, the next one (0 past the last) high."""
        low, high = byte * 2, T.min(byte * 2 + 1, width - 1)
        codes = [
            self.code(new[batch, group, token, channel], scale[group * width + channel]) + T.float32(8)
            for channel in (low, high)
        ]
        high_code = T.if_then_else(byte * 2 + 1 < width, T.Cast("int32", codes[1]), T.int32(8))
        return T.Cast("uint8", T.Cast("int32", codes[0]) + high_code * T.int32(16))

    def value(
        self, cache: Any, scale: Any, batch: Any, group: Any, slot: Any, channel: Any, width: int
    ) -> Any:
        """One element of a cache, in float32."""
        if not self.bits:
            return cache[batch, group, slot, channel]
        if self.bits == 8:
            return T.Cast("float32", cache[batch, group, slot, channel]) * scale[group * width + channel]
        byte = T.Cast("int32", cache[batch, group, slot, channel // 2])
        code = ((byte >> T.Cast("int32", channel % 2 * 4)) & T.int32(15)) - T.int32(8)
        return T.Cast("float32", code) * scale[group * width + channel]


@functools.cache
def attention_kernel(sizes: AttentionSizes, tiles: AttentionTiles = DEFAULT_TILES) -> Any:
    """A kernel over q [B,H,T,D], k, v [B,G,T,D], caches [B,G,C,W], positions [B,S], query positions [B,T],
    first slots [B], then k_scale, v_scale [G*D] when quantised, and the output [B,H,T,D].

    New tokens go to slots `first_slots[b] + t` of the caches, whose argument numbers are 3 and 4. Positions
    and slots are int64; values float32 or codes. A row that sees nothing gives 0; empty slots may hold NaN.
    """
    s = sizes
    keys_block, chunks_block, regs_rows = tiles.keys, tiles.keys // LANES, tiles.rows
    heads, groups, width, value_width = s.heads, s.kv_heads, s.width, s.value_width
    stored, value_stored = s.stored
    repeats = heads // groups
    tokens = max(1, tiles.tile_rows // repeats)
    rows = -(-repeats * tokens // regs_rows) * regs_rows
    value_chunks = -(-value_width // LANES)
    value_padded = value_chunks * LANES
    storage = STORAGE[s.bits]
    plain, bytewise, packed = s.bits == 0, s.bits == 8, s.bits == 4

    @T.inline
    def append(new, cache, scale, b, g, t, slot, channels):
        if plain:
            for d in T.serial(T.int64(channels)):
                cache[b, g, slot, d] = new[b, g, t, d]
        if bytewise:
            for d in T.serial(T.int64(channels)):
                cache[b, g, slot, d] = T.Cast("int8", s.code(new[b, g, t, d], scale[g * channels + d]))
        if packed:
            for d in T.serial(T.int64((channels + 1) // 2)):
                cache[b, g, slot, d] = s.pair(new, scale, b, g, t, d, channels)

    @T.inline
    def score(regs, queries, keys, ro):
        for r in T.unroll(T.int64(regs_rows)):
            for c in T.unroll(T.int64(chunks_block)):
                for lane in T.vectorized(T.int64(LANES)):
                    regs[r, c, lane] = T.float32(0)
        for d in T.serial(T.int64(width)):
            for r in T.unroll(T.int64(regs_rows)):
                for c in T.unroll(T.int64(chunks_block)):
                    for lane in T.vectorized(T.int64(LANES)):
                        regs[r, c, lane] = (
                            regs[r, c, lane] + queries[ro * regs_rows + r, d] * keys[d, c * LANES + lane]
                        )

    @T.inline
    def softmax(regs, best, row, r, maxima, sums, weights, out, query_positions, key_positions):
        for lane in T.vectorized(T.int64(LANES)):
            best[lane] = maxima[row]
        for c in T.unroll(T.int64(chunks_block)):
            for lane in T.vectorized(T.int64(LANES)):
                regs[r, c, lane] = T.Select(
                    s.visible(query_positions[row], key_positions[c * LANES + lane]),
                    s.capped(regs[r, c, lane]),
                    T.float32(LOWEST),
                )
            for lane in T.vectorized(T.int64(LANES)):
                best[lane] = T.max(best[lane], regs[r, c, lane])
        for lane in T.vectorized(T.int64(8)):
            best[lane] = T.max(best[lane], best[lane + 8])
        for lane in T.vectorized(T.int64(4)):
            best[lane] = T.max(best[lane], best[lane + 4])
        for lane in T.vectorized(T.int64(2)):
            best[lane] = T.max(best[lane], best[lane + 2])
        best[0] = T.max(best[0], best[1])
        # what is summed up already was relative to the old maximum
        best[1] = exp(maxima[row] - best[0])
        maxima[row] = best[0]
        for lane in T.vectorized(T.int64(LANES)):
            sums[row, lane] = sums[row, lane] * best[1]
        for c in T.unroll(T.int64(chunks_block)):
            for lane in T.vectorized(T.int64(LANES)):
                weights[row, c * LANES + lane] = T.Select(
                    regs[r, c, lane] > T.float32(LOWEST / 2), exp(regs[r, c, lane] - best[0]), T.float32(0)
                )
            for lane in T.vectorized(T.int64(LANES)):
                sums[row, lane] = sums[row, lane] + weights[row, c * LANES + lane]
        for c in T.serial(T.int64(value_chunks)):
            for lane in T.vectorized(T.int64(LANES)):
                out[row, c * LANES + lane] = out[row, c * LANES + lane] * best[1]

    @T.inline
    def accumulate(regs, weights, values, out, ro, chunks, first):
        for r in T.unroll(T.int64(regs_rows)):
            for c in T.unroll(T.int64(chunks)):
                for lane in T.vectorized(T.int64(LANES)):
                    regs[r, c, lane] = T.float32(0)
        for key in T.serial(T.int64(keys_block)):
            for r in T.unroll(T.int64(regs_rows)):
                for c in T.unroll(T.int64(chunks)):
                    for lane in T.vectorized(T.int64(LANES)):
                        regs[r, c, lane] = (
                            regs[r, c, lane]
                            + weights[ro * regs_rows + r, key] * values[key, (first + c) * LANES + lane]
                        )
        for r in T.unroll(T.int64(regs_rows)):
            for c in T.unroll(T.int64(chunks)):
                for lane in T.vectorized(T.int64(LANES)):
                    out[ro * regs_rows + r, (first + c) * LANES + lane] = (
                        out[ro * regs_rows + r, (first + c) * LANES + lane] + regs[r, c, lane]
                    )

    whole, rest = divmod(value_chunks, chunks_block)
    has_rest = rest > 0

    @T.inline
    def attend(
        q, k, v, cache_k, cache_v, positions, query_at, first_slots, k_scale, v_scale, out,
        batch, t_count, slots, shown,
    ):  # fmt: skip
        for bg in T.parallel(batch * groups):
            for t in T.serial(t_count):
                slot = first_slots[bg // groups] + t
                if T.And(slot >= 0, slot < slots):
                    append(k, cache_k, k_scale, bg // groups, bg % groups, t, slot, width)
                    append(v, cache_v, v_scale, bg // groups, bg % groups, t, slot, value_width)
        for task in T.parallel(batch * groups * ((t_count + tokens - 1) // tokens)):
            tiles = (t_count + tokens - 1) // tokens
            b = task // (groups * tiles)
            g = task // tiles % groups
            first = task % tiles * tokens
            used = T.min(t_count - first, tokens) * repeats
            keys = T.alloc_buffer((width, keys_block), "float32", scope="local")
            values = T.alloc_buffer((keys_block, value_padded), "float32", scope="local")
            queries = T.alloc_buffer((rows, width), "float32", scope="local")
            weights = T.alloc_buffer((rows, keys_block), "float32", scope="local")
            sum_out = T.alloc_buffer((rows, value_padded), "float32", scope="local")
            maxima = T.alloc_buffer((rows,), "float32", scope="local")
            sums = T.alloc_buffer((rows, LANES), "float32", scope="local")
            key_positions = T.alloc_buffer((keys_block,), "int32", scope="local")
            query_positions = T.alloc_buffer((rows,), "int32", scope="local")
            span = T.alloc_buffer((4,), "int32", scope="local")
            regs = T.alloc_buffer((regs_rows, chunks_block, LANES), "float32", scope="local")
            best = T.alloc_buffer((LANES,), "float32", scope="local")
            span[0] = T.int32(LAST)
            span[1] = T.int32(-1)
            for row in T.serial(T.int64(rows)):
                maxima[row] = T.float32(LOWEST)
                query_positions[row] = T.if_then_else(
                    row < used,
                    T.Cast("int32", query_at[b, T.min(first + row // repeats, t_count - 1)]),
                    T.int32(-1),
                )
                if row < used:
                    span[0] = T.min(span[0], query_positions[row])
                    span[1] = T.max(span[1], query_positions[row])
                for lane in T.vectorized(T.int64(LANES)):
                    sums[row, lane] = T.float32(0)
                for d in T.serial(T.int64(width)):
                    queries[row, d] = T.if_then_else(
                        row < used,
                        q[b, g * repeats + row % repeats, T.min(first + row // repeats, t_count - 1), d]
                        * T.float32(s.scale),
                        T.float32(0),
                    )
                for d in T.serial(T.int64(value_padded)):
                    sum_out[row, d] = T.float32(0)
            for key in T.serial(T.int64(keys_block)):
                for d in T.serial(T.int64(value_padded)):
                    values[key, d] = T.float32(0)
            for kb in T.serial((shown + keys_block - 1) // keys_block):
                span[2] = T.int32(LAST)
                span[3] = T.int32(-1)
                for key in T.serial(T.int64(keys_block)):
                    key_positions[key] = T.if_then_else(
                        kb * keys_block + key < shown,
                        T.Cast("int32", positions[b, T.min(kb * keys_block + key, shown - 1)]),
                        T.int32(-1),
                    )
                    span[2] = T.min(
                        span[2], T.if_then_else(key_positions[key] < 0, T.int32(LAST), key_positions[key])
                    )
                    span[3] = T.max(span[3], key_positions[key])
                if T.Not(s.hidden(span[0], span[1], span[2], span[3])):
                    for key in T.serial(T.int64(keys_block)):
                        # past the last slot there is nothing to read; positions hide it
                        held = T.min(kb * keys_block + key, slots - 1)
                        for d in T.serial(T.int64(width)):
                            keys[d, key] = s.value(cache_k, k_scale, b, g, held, d, width)
                        for d in T.serial(T.int64(value_width)):
                            # 0 * NaN would spread what an empty slot holds
                            values[key, d] = T.if_then_else(
                                key_positions[key] >= 0,
                                s.value(cache_v, v_scale, b, g, held, d, value_width),
                                T.float32(0),
                            )
                    for ro in T.serial((used + regs_rows - 1) // regs_rows):
                        score(regs, queries, keys, ro)
                        for r in T.unroll(T.int64(regs_rows)):
                            softmax(
                                regs, best, ro * regs_rows + r, r, maxima, sums, weights, sum_out,
                                query_positions, key_positions,
                            )  # fmt: skip
                        for c in T.serial(T.int64(whole)):
                            accumulate(regs, weights, values, sum_out, ro, chunks_block, c * chunks_block)
                        if has_rest:
                            accumulate(
                                regs, weights, values, sum_out, ro, rest, T.int64(whole * chunks_block)
                            )
            for row in T.serial(used):
                best[0] = T.float32(0)
                for lane in T.serial(T.int64(LANES)):
                    best[0] = best[0] + sums[row, lane]
                best[0] = T.if_then_else(best[0] > T.float32(0), T.float32(1) / best[0], T.float32(0))
                for d in T.serial(T.int64(value_width)):
                    out[b, g * repeats + row % repeats, first + row // repeats, d] = sum_out[row, d] * best[0]

    if plain:

        @T.prim_func(s_tir=True)
        def attention(
            q_: T.handle, k_: T.handle, v_: T.handle, cache_k_: T.handle, cache_v_: T.handle,
            positions_: T.handle, query_at_: T.handle, first_slots_: T.handle, out_: T.handle,
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
            batch = T.int64()
            t_count = T.int64()
            slots = T.int64()
            shown = T.int64()
            q = T.match_buffer(q_, (batch, heads, t_count, width), "float32", align=4)
            k = T.match_buffer(k_, (batch, groups, t_count, width), "float32", align=4)
            v = T.match_buffer(v_, (batch, groups, t_count, value_width), "float32", align=4)
            cache_k = T.match_buffer(cache_k_, (batch, groups, slots, stored), storage, align=4)
            cache_v = T.match_buffer(cache_v_, (batch, groups, slots, value_stored), storage, align=4)
            positions = T.match_buffer(positions_, (batch, shown), "int64", align=8)
            query_at = T.match_buffer(query_at_, (batch, t_count), "int64", align=8)
            first_slots = T.match_buffer(first_slots_, (batch,), "int64", align=8)
            out = T.match_buffer(out_, (batch, heads, t_count, value_width), "float32", align=4)
            attend(
                q, k, v, cache_k, cache_v, positions, query_at, first_slots, q, q, out,
                batch, t_count, slots, shown,
            )  # fmt: skip

        return attention

    @T.prim_func(s_tir=True)
    def quantized_attention(
        q_: T.handle, k_: T.handle, v_: T.handle, cache_k_: T.handle, cache_v_: T.handle,
        positions_: T.handle, query_at_: T.handle, first_slots_: T.handle,
        k_scale_: T.handle, v_scale_: T.handle, out_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch = T.int64()
        t_count = T.int64()
        slots = T.int64()
        shown = T.int64()
        q = T.match_buffer(q_, (batch, heads, t_count, width), "float32", align=4)
        k = T.match_buffer(k_, (batch, groups, t_count, width), "float32", align=4)
        v = T.match_buffer(v_, (batch, groups, t_count, value_width), "float32", align=4)
        cache_k = T.match_buffer(cache_k_, (batch, groups, slots, stored), storage, align=1)
        cache_v = T.match_buffer(cache_v_, (batch, groups, slots, value_stored), storage, align=1)
        positions = T.match_buffer(positions_, (batch, shown), "int64", align=8)
        query_at = T.match_buffer(query_at_, (batch, t_count), "int64", align=8)
        first_slots = T.match_buffer(first_slots_, (batch,), "int64", align=8)
        k_scale = T.match_buffer(k_scale_, (groups * width,), "float32", align=4)
        v_scale = T.match_buffer(v_scale_, (groups * value_width,), "float32", align=4)
        out = T.match_buffer(out_, (batch, heads, t_count, value_width), "float32", align=4)
        attend(
            q, k, v, cache_k, cache_v, positions, query_at, first_slots, k_scale, v_scale, out,
            batch, t_count, slots, shown,
        )  # fmt: skip

    return quantized_attention
