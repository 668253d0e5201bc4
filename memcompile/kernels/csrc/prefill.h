// Prefill: online-softmax attention (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135), 64 queries of a head at a time, a vector lane a query. Scores are kept as [key][query],
// so the softmax runs down the columns and needs no sum across lanes.
#pragma once
#include "attention.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"
#include "visibility.h"
#if defined(MC_AMX)
#include "prefill_amx.h"
#endif

namespace MC_ISA {

constexpr int MAX_TILE = 128;
constexpr float NOTHING = -1e30f;  // the running maximum before any key
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Prefill {
    const McAttention *c;
    const Interval *keys;       // [B or 1][S]
    const TileView *views;      // [B or 1][tiles]
    const int32_t *query_at;    // [B][T]
    int64_t keys_stride, tiles;
    int32_t key_tile, query_tile, query_tiles;
    bool pairs;                 // bfloat16 pairs instead of float
    bool in_place;              // keys are such pairs as they are stored
    bool in_tiles;              // pairs are multiplied in the tiles of AMX
    // besides the blocks: single keys [B,H,most_columns], [B,H]; or null
    const int32_t *columns, *column_count;
    int64_t most_columns;
    mutable bool no_memory;     // some task found none
};

// Keys that were chosen one by one, as far as no block of this tile of queries holds them.
struct Columns {
    const int32_t *slots;
    int64_t count, next;
    const uint8_t *blocks;  // the row of this tile of queries
    int64_t block_tokens;
};

// Gather up to `most` rows of keys and values into tiles; gives how many, 0 at the end.
static int gather_columns(const McAttention &c, int64_t b, int64_t g, Columns &columns, int most, float *k,
                          float *v, const Interval *all, Interval *keys) {
    int n = 0;
    for (; columns.next < columns.count && n < most; columns.next++) {
        int64_t slot = columns.slots[columns.next];
        if (columns.blocks[slot / columns.block_tokens] || all[slot].low > all[slot].high) continue;
        widen_row(c.kv_type, c.k.data, b * c.k.batch + g * c.k.head + slot * c.k.token, c.D, k + n * c.D);
        widen_row(c.kv_type, c.v.data, b * c.v.batch + g * c.v.head + slot * c.v.token, c.D, v + n * c.D);
        int64_t at = (b * c.G + g) * c.S + slot;
        for (int64_t d = 0; d < c.D; d++) {
            if (c.k_token_scale) k[n * c.D + d] *= c.k_token_scale[at];
            if (c.v_token_scale) v[n * c.D + d] *= c.v_token_scale[at];
        }
        keys[n++] = all[slot];
    }
    return n;
}

// Columns [nq] of x [D][64] from rows of q; the last columns are zero.
static void load_queries(const McAttention &c, int64_t b, int64_t h, int64_t t0, int nq, float *x,
                         const float *key_scale, float *rows) {
    int64_t D = c.D;
    for (int t = 0; t < QUERIES; t += LANES) {
        for (int i = 0; i < LANES; i++) {
            float *row = rows + i * D;
            if (t + i < nq) {
                int64_t at = b * c.q.batch + h * c.q.head + (t0 + t + i) * c.q.token;
                widen_row(c.q_type, c.q.data, at, D, row);
                if (key_scale)
                    for (int64_t d = 0; d < D; d++) row[d] *= key_scale[d];
            } else
                for (int64_t d = 0; d < D; d++) row[d] = 0;
        }
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) {
            Vf tile[LANES];
            for (int i = 0; i < LANES; i++) tile[i] = load(rows + i * D + d);
            transpose(tile);
            for (int i = 0; i < LANES; i++) store(x + (d + i) * QUERIES + t, tile[i]);
        }
        for (; d < D; d++)
            for (int i = 0; i < LANES; i++) x[d * QUERIES + t + i] = rows[i * D + d];
    }
}

// Rows [LANES][D] from the columns t .. t+LANES-1 of o [D][64].
static void rows_of(const float *o, int t, int64_t D, float *rows) {
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        Vf tile[LANES];
        for (int i = 0; i < LANES; i++) tile[i] = load(o + (d + i) * QUERIES + t);
        transpose(tile);
        for (int i = 0; i < LANES; i++) store(rows + i * D + d, tile[i]);
    }
    for (; d < D; d++)
        for (int i = 0; i < LANES; i++) rows[i * D + d] = o[d * QUERIES + t + i];
}

#if defined(MC_PAIRS)
static inline Vi pairs_of(const float *low, const float *high) {
    return pair_of(load(low), high ? load(high) : (Vf){});
}
static inline Vi pairs_of(const uint16_t *low, const uint16_t *high) {
    return ((Vi)widen_bf16(low) >> 16 & 0xffff) | (high ? (Vi)widen_bf16(high) : (Vi){});
}

// value rows [n][D] of floats or bfloat16 -> [ceil(n/2)][D] of pairs (row 2i, row 2i+1); a missing row is zero
template <class X> static void pair_values(const X *rows, int64_t stride, int n, int64_t D, uint32_t *y) {
    for (int i = 0; i < n; i += 2) {
        const X *a = rows + i * stride, *b = i + 1 < n ? a + stride : nullptr;
        uint32_t *to = y + i / 2 * D;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) store_int((int32_t *)to + d, pairs_of(a + d, b ? b + d : nullptr));
        for (; d < D; d++) to[d] = to_bf16(a[d]) | (b ? (uint32_t)to_bf16(b[d]) << 16 : 0);
    }
}

// Rows [n][D] of keys as bfloat16; `row` has room for one of floats.
static void round_keys(const McAttention &c, int64_t at, int n, float *row, uint16_t *y) {
    for (int i = 0; i < n; i++) {
        const float *from = c.kv_type == MC_F32 ? (const float *)c.k.data + at + i * c.k.token : row;
        if (from == row) widen_row(c.kv_type, c.k.data, at + i * c.k.token, c.D, row);
        narrow_row(MC_BF16, from, c.D, y, i * c.D);
    }
}

// s [n][64] = keys [n][D] * queries [D/2][64] of pairs
static void score_pairs(const Prefill &p, const uint32_t *k, int64_t k_row, const uint32_t *x, int n, float *s,
                        int columns) {
#if defined(MC_AMX)
    if (p.in_tiles) return tile_product(k, k_row, x, n, p.c->D / 2, s, columns, false);
#endif
#if defined(__AVX512BF16__)
    product<uint32_t>(k, k_row, 1, x, n, p.c->D / 2, s, columns, false);
#endif
}

// o [D][64] += values [n][D] * pairs of probabilities [n/2][64]; the pairs of the values go to v_pairs.
template <class X>
static void add_pairs(const Prefill &p, const X *v, int64_t v_row, int n, uint32_t *v_pairs, uint32_t *s_pairs,
                      float *o, int columns) {
    int64_t D = p.c->D, rows = (n + 1) / 2 * 2;
#if defined(MC_AMX)
    if (p.in_tiles) rows = 2 * tile_pairs(n);
    // softmax has written the pairs of n rows
    for (int64_t i = (n + 1) / 2 * QUERIES; i < rows / 2 * QUERIES; i++) s_pairs[i] = 0;
    if (p.in_tiles) {
        transpose_values(v, v_row, n, D, v_pairs);
        return tile_product(v_pairs, rows / 2, s_pairs, D, rows / 2, o, columns, true);
    }
#endif
#if defined(__AVX512BF16__)
    pair_values(v, v_row, n, D, v_pairs);
    product<uint32_t>(v_pairs, 1, D, s_pairs, D, rows / 2, o, columns, true);
#endif
}
#endif

// Scores of keys that not all queries see.
static void hide(float *s, int n, int columns, const Interval *keys, const int32_t *at) {
    for (int j = 0; j < n; j++) {
        Vi low = all_int(keys[j].low), high = all_int(keys[j].high);
        for (int v = 0; v < columns; v += LANES) {
            Vi q = load_int(at + v);
            float *x = s + j * QUERIES + v;
            store(x, ((q >= low) & (q <= high)) ? load(x) : all(-__builtin_inff()));
        }
    }
}

static inline void softcap(float *s, int n, int columns, float scale, float cap) {
    for (int j = 0; j < n; j++)
        for (int v = 0; v < columns; v += LANES) {
            float *x = s + j * QUERIES + v;
            store(x, tanhv(load(x) * (scale / cap)) * cap);
        }
}

// s [n][64] scores -> probabilities against the running maximum, each row times its factor where there are any;
// gives what earlier sums shrink by. As pairs of bfloat16, where `pairs` is given, a missing row being zero.
static void softmax(float *s, int n, int columns, float to_log2, float *m, float *l, float *shrink,
                    const float *factors = nullptr, uint32_t *pairs = nullptr) {
    for (int v = 0; v < columns; v += LANES) {
        Vf top = load(s + v);
        for (int j = 1; j < n; j++) top = larger(top, load(s + j * QUERIES + v));
        Vf old = load(m + v), now = larger(old, top * to_log2);
        Vf sum = {};
#if defined(MC_PAIRS)
        for (int j = 0; pairs && j < n; j += 2) {
            Vf low = exp2_rough(load(s + j * QUERIES + v) * to_log2 - now), high = {};
            if (j + 1 < n) high = exp2_rough(load(s + (j + 1) * QUERIES + v) * to_log2 - now);
            sum += low + high;
            if (factors) low *= factors[j], high *= j + 1 < n ? factors[j + 1] : 0.0f;
            store_int((int32_t *)pairs + j / 2 * QUERIES + v, pair_of(low, high));
        }
#endif
        for (int j = 0; !pairs && j < n; j++) {
            float *x = s + j * QUERIES + v;
            Vf y = exp2v(load(x) * to_log2 - now);
            store(x, factors ? y * factors[j] : y);
            sum += y;
        }
        Vf less = exp2v(old - now);
        store(shrink + v, less);
        store(l + v, load(l + v) * less + sum);
        store(m + v, now);
    }
}

static void shrink_rows(float *o, int64_t rows, int columns, const float *by) {
    for (int v = 0; v < columns; v += LANES) {
        Vf f = load(by + v);
        bool same = true;
        for (int i = 0; i < LANES; i++) same &= f[i] == 1.0f;
        if (same) continue;
        for (int64_t r = 0; r < rows; r++) store(o + r * QUERIES + v, load(o + r * QUERIES + v) * f);
    }
}

// Zeros for the values of empty slots, which may hold anything, NaN included.
static void clear_empty(const Interval *keys, int n, int64_t D, float *rows) {
    for (int i = 0; i < n; i++)
        if (keys[i].low > keys[i].high)
            for (int64_t d = 0; d < D; d++) rows[i * D + d] = 0;
}

static bool chosen(const McAttention &c, const uint8_t *row, int64_t t0, int nq, int64_t s0, int n) {
    int64_t across = (c.S + c.block_tokens - 1) / c.block_tokens;
    for (int64_t i = t0 / c.block_tokens; i <= (t0 + nq - 1) / c.block_tokens; i++)
        for (int64_t j = s0 / c.block_tokens; j <= (s0 + n - 1) / c.block_tokens; j++)
            if (row[i * across + j]) return true;
    return false;
}

static inline int columns_of(int queries) { return (queries + LANES - 1) / LANES * LANES; }

static size_t prefill_bytes(const McAttention &c) {
    size_t D = (size_t)c.D;
    return 4 * (D * QUERIES * 3 + MAX_TILE * QUERIES * 2 + MAX_TILE * D * 2 + 8 * QUERIES + 4 * D + 2 * MAX_TILE) + 4096;
}

static void prefill_task(void *data, size_t index) {
    const Prefill &p = *(const Prefill *)data;
    const McAttention &c = *p.c;
    int64_t D = c.D, G = c.G, group = c.H / G;
    // the last queries have the most keys: they go first, so that no thread is left with them alone
    int64_t qt = p.query_tiles - 1 - (int64_t)(index % (size_t)p.query_tiles);
    int64_t h = (int64_t)(index / (size_t)p.query_tiles) % c.H;
    int64_t b = (int64_t)(index / (size_t)p.query_tiles) / c.H, g = h / group;
    int64_t t0 = qt * p.query_tile;
    int nq = (int)(c.T - t0 < p.query_tile ? c.T - t0 : p.query_tile);
    int columns = columns_of(nq);
    if (!scratch.reserve(prefill_bytes(c))) {
        __atomic_store_n(&p.no_memory, true, __ATOMIC_RELAXED);
        return;
    }

    float *x = scratch.take<float>(D * QUERIES), *o = scratch.take<float>(D * QUERIES);
    float *s = scratch.take<float>(MAX_TILE * QUERIES);
    float *k_tile = scratch.take<float>(MAX_TILE * D), *v_tile = scratch.take<float>(MAX_TILE * D);
    float *m = scratch.take<float>(QUERIES), *l = scratch.take<float>(QUERIES);
    float *shrink = scratch.take<float>(QUERIES);
    int32_t *at = scratch.take<int32_t>(QUERIES);
    const float *ks = c.k_scale ? c.k_scale + g * D : nullptr;
    load_queries(c, b, h, t0, nq, x, ks, k_tile);
    uint32_t *p_pairs = nullptr;
#if defined(MC_PAIRS)
    uint32_t *x_pairs = scratch.take<uint32_t>(D / 2 * QUERIES);
    if (p.pairs) {
        p_pairs = scratch.take<uint32_t>(MAX_TILE / 2 * QUERIES);
        pair_rows(x, D, x_pairs);
    }
#endif
    for (int i = 0; i < QUERIES; i++) m[i] = NOTHING, l[i] = 0;
    for (int64_t i = 0; i < D * QUERIES; i++) o[i] = 0;
    int32_t q_from = LAST, q_to = FIRST;
    for (int i = 0; i < QUERIES; i++) {
        // a column that is only there to fill a vector sees what the first one sees
        at[i] = p.query_at[b * c.T + t0 + (i < nq ? i : 0)];
        if (at[i] < q_from) q_from = at[i];
        if (at[i] > q_to) q_to = at[i];
    }
    const Interval *keys = p.keys + b * p.keys_stride;
    const TileView *views = p.views + (p.keys_stride ? b * p.tiles : 0);
    const uint8_t *blocks = c.blocks ? c.blocks + b * c.blocks_batch + h * c.blocks_head : nullptr;
    float to_log2 = c.softcap > 0 ? LOG2E : c.scale * LOG2E;
    int64_t used = c.used ? c.used[b] : c.S;

#if defined(MC_AMX)
    if (p.in_tiles) tiles_begin();
#endif
    for (int64_t j = 0; j * p.key_tile < used; j++) {
        const TileView &view = views[j];
        if (view.lowest > q_to || view.highest < q_from) continue;
        int64_t s0 = j * p.key_tile;
        int n = (int)(used - s0 < p.key_tile ? used - s0 : p.key_tile);
        if (blocks && !chosen(c, blocks, t0, nq, s0, n)) continue;
        int64_t k_at = b * c.k.batch + g * c.k.head + s0 * c.k.token;
        int64_t v_at = b * c.v.batch + g * c.v.head + s0 * c.v.token;
        bool whole = view.all_from <= q_from && view.all_to >= q_to;
#if defined(MC_PAIRS)
        if (p.pairs) {
            const uint16_t *k = (const uint16_t *)c.k.data + k_at;
            int64_t k_step = c.k.token;
            if (!p.in_place) {
                round_keys(c, k_at, n, v_tile, (uint16_t *)k_tile);
                k = (const uint16_t *)k_tile, k_step = D;
            }
            score_pairs(p, (const uint32_t *)k, k_step / 2, x_pairs, n, s, columns);
        } else
#endif
        {
            int64_t k_step = c.k.token;
            const float *k = (const float *)c.k.data + k_at;
            if (c.kv_type != MC_F32) {
                widen_rows(c.kv_type, c.k.data, k_at, c.k.token, n, D, k_tile);
                k = k_tile, k_step = D;
            }
            product<float>(k, k_step, 1, x, n, D, s, columns, false);
        }
        if (c.k_token_scale) scale_rows(s, n, columns, c.k_token_scale + (b * G + g) * c.S + s0);
        if (c.softcap > 0) softcap(s, n, columns, c.scale, c.softcap);
        if (!whole) hide(s, n, columns, keys + s0, at);
        const float *factors = c.v_token_scale ? c.v_token_scale + (b * G + g) * c.S + s0 : nullptr;
        softmax(s, n, columns, to_log2, m, l, shrink, factors, p_pairs);
        shrink_rows(o, D, columns, shrink);
        int64_t v_step = c.v.token;
#if defined(MC_PAIRS)
        if (p.pairs && c.kv_type == MC_BF16 && !view.has_empty) {
            add_pairs(p, (const uint16_t *)c.v.data + v_at, v_step, n, (uint32_t *)v_tile, p_pairs, o, columns);
            continue;
        }
#endif
        const float *v = (const float *)c.v.data + v_at;
        if (c.kv_type != MC_F32 || view.has_empty) {
            // the keys' tile is read no more
            widen_rows(c.kv_type, c.v.data, v_at, v_step, n, D, k_tile);
            clear_empty(keys + s0, n, D, k_tile);
            v = k_tile, v_step = D;
        }
#if defined(MC_PAIRS)
        if (p.pairs) {
            add_pairs(p, v, v_step, n, (uint32_t *)v_tile, p_pairs, o, columns);
            continue;
        }
#endif
        product<float>(v, 1, v_step, s, D, n, o, columns, true);
    }

    if (p.columns && blocks) {
        int64_t head = b * c.H + h, across = (c.S + c.block_tokens - 1) / c.block_tokens;
        Columns single = {p.columns + head * p.most_columns, p.column_count[head], 0,
                           blocks + t0 / c.block_tokens * across, c.block_tokens};
        Interval *seen = scratch.take<Interval>(MAX_TILE);
        while (int n = gather_columns(c, b, g, single, QUERIES, k_tile, v_tile, keys, seen)) {
#if defined(MC_PAIRS)
            if (p.pairs) {
                // half of the tile is free: at most QUERIES keys are gathered
                uint16_t *rounded = (uint16_t *)(k_tile + QUERIES * D);
                for (int i = 0; i < n; i++) narrow_row(MC_BF16, k_tile + i * D, D, rounded, i * D);
                score_pairs(p, (const uint32_t *)rounded, D / 2, x_pairs, n, s, columns);
            } else
#endif
                product<float>(k_tile, D, 1, x, n, D, s, columns, false);
            if (c.softcap > 0) softcap(s, n, columns, c.scale, c.softcap);
            hide(s, n, columns, seen, at);
            softmax(s, n, columns, to_log2, m, l, shrink, nullptr, p_pairs);
            shrink_rows(o, D, columns, shrink);
#if defined(MC_PAIRS)
            if (p.pairs) {
                add_pairs(p, v_tile, D, n, (uint32_t *)k_tile, p_pairs, o, columns);
                continue;
            }
#endif
            product<float>(v_tile, 1, D, s, D, n, o, columns, true);
        }
    }
#if defined(MC_AMX)
    if (p.in_tiles) tiles_end();
#endif

    const float *vs = c.v_scale ? c.v_scale + g * D : nullptr;
    for (int t = 0; t < nq; t++) {
        float *row = k_tile + t % LANES * D;
        if (t % LANES == 0) rows_of(o, t, D, k_tile);
        float by = l[t] > 0 ? 1.0f / l[t] : 0.0f;
        for (int64_t d = 0; d < D; d++) row[d] *= vs ? by * vs[d] : by;
        narrow_row(c.q_type, row, D, c.out.data, b * c.out.batch + h * c.out.head + (t0 + t) * c.out.token);
        if (c.lse)
            c.lse[(b * c.H + h) * c.T + t0 + t] =
                l[t] > 0 ? m[t] * LN2 + __builtin_logf(l[t]) : -__builtin_inff();
    }
}

}  // namespace MC_ISA
