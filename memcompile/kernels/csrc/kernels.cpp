// One instruction set's kernels. Compiled once a set, with MC_ISA its name.
#include "decode.h"
#include "pages.h"
#include "prefill.h"
#include "select.h"
#include "tasks.h"

namespace MC_ISA {

// Positions of the queries, one a row and token.
static void find_queries(const McAttention &c, int32_t *at) {
    for (int64_t b = 0; b < c.B; b++)
        for (int64_t t = 0; t < c.T; t++) {
            int64_t slot = (c.used ? c.used[b] : c.S) - c.T + t, position = slot;
            if (c.query_positions) position = c.query_positions[b * c.T + t];
            else if (c.key_positions) position = slot < 0 ? -1 : c.key_positions[b * c.positions_stride + slot];
            bool padding = position < 0 && (c.query_positions || c.key_positions);
            at[b * c.T + t] = padding ? NOWHERE : (int32_t)position;
        }
}

// Whether decode may take every key before the query without asking: the usual cache.
static bool all_visible(const McAttention &c) {
    return !c.key_positions && !c.query_positions && c.window == 0 && c.T == 1;
}

static int32_t decode(const McAttention &c, int32_t *at, const Interval *keys, int64_t keys_stride) {
    Decode d = {&c, keys, at, keys_stride, 0, (int32_t)(c.H / c.G * c.T), nullptr, false};
    int64_t heads = c.B * c.G, candidates = c.slots ? c.slot_count : c.S;
    int64_t most = (candidates + 127) / 128;
    // enough parts to keep the threads level, few enough that a part is worth its merge
    d.parts = c.splits > 0 ? c.splits : (c.threads * 4 + heads - 1) / heads;
    // as many for one thread as for the next: an odd one is waited for
    while (c.splits <= 0 && heads * d.parts % c.threads) d.parts++;
    if (c.splits <= 0 && c.threads <= 1) d.parts = 1;
    if (d.parts > most) d.parts = most;
    if (d.parts < 1) d.parts = 1;
    size_t count = (size_t)(heads * d.parts), bytes = count * (size_t)d.rows * (size_t)(c.D + 2) * 4;
    void *p = nullptr;
    if (posix_memalign(&p, 64, bytes)) return 2;
    d.partial = (float *)p;
    run(c, decode_task, count, &d);
    if (!d.no_memory) merge_parts(d);
    free(p);
    return d.no_memory ? 2 : 0;
}

constexpr int64_t NARROW_WINDOW = 512;

static int32_t prefill(const McAttention &c, int32_t *at, const Interval *keys, int64_t keys_stride,
                       const Selection *chosen) {
    Prefill p = {&c, keys, nullptr, at, keys_stride, 0, 0, 0, 0, false, false, false, nullptr, nullptr, 0, false};
    if (chosen) p.columns = chosen->columns, p.column_count = chosen->column_count, p.most_columns = chosen->most;
#if defined(MC_PAIRS)
    p.pairs = c.D % 2 == 0 && (c.products == MC_BF16 || (c.kv_type == MC_BF16 && c.q_type == MC_BF16));
#endif
    // over a narrow window much of a wide tile is hidden
    p.key_tile = c.key_tile ? c.key_tile : c.window > 0 && c.window < NARROW_WINDOW ? 32 : p.pairs ? 128 : 64;
    p.query_tile = QUERIES;
    if (c.blocks && c.block_tokens < p.key_tile) p.key_tile = (int32_t)c.block_tokens;
    if (c.blocks && c.block_tokens < p.query_tile) p.query_tile = (int32_t)c.block_tokens;
    p.tiles = (c.S + p.key_tile - 1) / p.key_tile;
    p.query_tiles = (int32_t)((c.T + p.query_tile - 1) / p.query_tile);
#if defined(MC_PAIRS)
    p.in_place = c.kv_type == MC_BF16 && c.k.token % 2 == 0 && c.k.head % 2 == 0 && c.k.batch % 2 == 0;
#if defined(MC_AMX)
    // a tile is 32 channels wide
    p.in_tiles = p.pairs && c.D % 32 == 0;
#if !defined(__AVX512BF16__)
    p.pairs = p.in_tiles;
#endif
#endif
#endif
    int64_t rows = keys_stride ? c.B : 1;
    TileView *views = (TileView *)malloc((size_t)(rows * p.tiles + 1) * sizeof(TileView));
    if (!views) return 2;
    for (int64_t b = 0; b < rows; b++)
        for (int64_t j = 0; j < p.tiles; j++) {
            int64_t s0 = j * p.key_tile, n = c.S - s0 < p.key_tile ? c.S - s0 : p.key_tile;
            views[b * p.tiles + j] = view_of(keys + b * keys_stride + s0, n);
        }
    p.views = views;
    run(c, prefill_task, (size_t)(c.B * c.H * p.query_tiles), &p);
    free(views);
    return p.no_memory ? 2 : 0;
}

// Choose blocks and columns by the heads' patterns, then attend over them.
static int32_t sparse_prefill(McAttention c, int32_t *at, const Interval *keys, int64_t keys_stride) {
    if (!patterns_are_legal(c)) return 4;
    Selection s = {&c, c.block_tokens, (c.S + c.block_tokens - 1) / c.block_tokens,
                   (c.T + c.block_tokens - 1) / c.block_tokens, nullptr, nullptr, nullptr, 0, false};
    for (int64_t h = 0; h < c.H; h++)
        if (c.pattern[h * 4] == VERTICAL_SLASH && c.pattern[h * 4 + 1] > s.most) s.most = c.pattern[h * 4 + 1];
    if (s.most) s.most = s.most < FORCED_COLUMNS ? FORCED_COLUMNS : s.most;
    size_t heads = (size_t)(c.B * c.H);
    s.blocks = (uint8_t *)malloc(heads * (size_t)(s.down * s.across) + 1);
    s.columns = (int32_t *)malloc(heads * (size_t)s.most * 4 + 1);
    s.column_count = (int32_t *)malloc(heads * 4 + 1);
    int32_t code = 2;
    if (s.blocks && s.columns && s.column_count) {
        run(c, select_task, heads, &s);
        c.blocks = s.blocks, c.blocks_head = s.down * s.across, c.blocks_batch = c.H * c.blocks_head;
        if (!s.failed) code = prefill(c, at, keys, keys_stride, s.most ? &s : nullptr);
    }
    free(s.blocks);
    free(s.columns);
    free(s.column_count);
    return code;
}

// Whether some head of some row has something to choose.
static bool has_choice(const McAttention &c) {
    if (!c.pattern || c.blocks || c.T <= MAX_ROWS) return false;
    for (int64_t b = 0; b < c.B; b++) {
        int64_t used = c.used ? c.used[b] : c.S;
        if (used <= c.pattern_from) continue;
        for (int64_t h = 0; h < c.H; h++)
            if (!covers(c.pattern + h * 4, used, c.block_tokens)) return true;
    }
    return false;
}

int32_t attention(const McAttention &c) {
    int32_t *at = (int32_t *)malloc((size_t)(c.B * c.T + 1) * 4);
    if (!at) return 2;
    find_queries(c, at);
    bool choice = has_choice(c), few = c.H / c.G * c.T <= MAX_ROWS && whole_vectors(c) && !c.blocks && !choice;
    Interval *keys = nullptr;
    int64_t keys_stride = 0;
    if (!few || !all_visible(c)) {
        int64_t rows = c.key_positions && c.positions_stride ? c.B : 1;
        keys_stride = rows > 1 ? c.S : 0;
        keys = (Interval *)malloc((size_t)(rows * c.S + 1) * sizeof(Interval));
        if (!keys) {
            free(at);
            return 2;
        }
        for (int64_t b = 0; b < rows; b++)
            for (int64_t s = 0; s < c.S; s++)
                keys[b * c.S + s] = interval_of(c, c.key_positions ? c.key_positions[b * c.positions_stride + s] : s);
    }
    int32_t code;
    if (c.bounds.data && c.T == 1 && !c.slots && !c.blocks)
        code = attend_to_pages(c, few, [&](const McAttention &chosen) {
            if (few) return decode(chosen, at, keys, keys_stride);
            return prefill(chosen, at, keys, keys_stride, nullptr);
        });
    else if (few) code = decode(c, at, keys, keys_stride);
    else if (c.slots) code = 3;
    else if (choice) code = sparse_prefill(c, at, keys, keys_stride);
    else code = prefill(c, at, keys, keys_stride, nullptr);
    free(keys);
    free(at);
    return code;
}

static void append_row(const McAppend &a, const McTensor &from, const McTensor &to, int64_t b, int64_t t,
                       int64_t g, int64_t slot, const float *scale, float *row) {
    widen_row(a.type, from.data, b * from.batch + g * from.head + t * from.token, a.D, row);
    int64_t at = b * to.batch + g * to.head + slot * to.token;
    if (a.cache_type <= MC_F16) return narrow_row(a.cache_type, row, a.D, to.data, at);
    int low = a.cache_type == MC_I8 ? -128 : -8, high = -low - 1;
    for (int64_t d = 0; d < a.D; d++) {
        float x = __builtin_nearbyintf(row[d] / scale[g * a.D + d]);
        int code = (int)(x < (float)low ? (float)low : x > (float)high ? (float)high : x);
        if (a.cache_type == MC_I8) ((int8_t *)to.data)[at + d] = (int8_t)code;
        else {
            uint8_t *byte = (uint8_t *)to.data + at + d / 2;
            *byte = d % 2 ? (uint8_t)((*byte & 15) | (code + 8) << 4) : (uint8_t)(code + 8);
        }
    }
}

int32_t append(const McAppend &a) {
    float row[256];
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t t = 0; t < a.T; t++) {
            int64_t slot = a.used[b] - a.T + t;
            if (slot < 0) continue;  // a row shorter than the chunk
            for (int64_t g = 0; g < a.G; g++) {
                append_row(a, a.k, a.past_k, b, t, g, slot, a.k_scale, row);
                append_row(a, a.v, a.past_v, b, t, g, slot, a.v_scale, row);
            }
        }
    return 0;
}

}  // namespace MC_ISA
