// A linear layer over many rows of x: bound by arithmetic. The 64 columns of product.h are rows of the weight:
// a panel of them is unpacked, a chunk of K at a time, into the first cache, and every row of x passes over it.
#pragma once
#include "linear_few.h"
#include "linear_inputs.h"
#include "product.h"

namespace MC_ISA {

constexpr int64_t PANEL = QUERIES;
constexpr int64_t MOST_TOGETHER = 256;  // rows of x that share an unpacked panel
constexpr int64_t CODES_TOGETHER = 256;  // codes of a row in a panel; whole chunks and blocks

struct Many {
    const Inputs *in;
    int64_t together, row_tasks;  // rows of x in a task, tasks of a panel
};

// [LANES][LANES] -> column `at` of y [LANES][PANEL]
static inline void put_columns(Vf (&rows)[LANES], float *y) {
    transpose(rows);
    for (int i = 0; i < LANES; i++) store(y + i * PANEL, rows[i]);
}

// Bytes of codes of rows n0.. of the weight, from byte `at` of a row on: [4-byte group][PANEL], low halves of the
// bytes first where they hold two codes.
static void unpack_codes(const Inputs &in, int64_t n0, int64_t at, int64_t width, int32_t *y) {
    const McLinear &l = *in.l;
    for (int64_t n = 0; n < PANEL; n += LANES) {
        Vi bytes[LANES];
        for (int i = 0; i < LANES; i++)
            bytes[i] = n0 + n + i < l.N
                           ? load_bytes((const uint8_t *)l.weight + (n0 + n + i) * width + at, width - at)
                           : (Vi){};
        Vf part[LANES];
        for (int i = 0; i < LANES; i++) part[i] = (Vf)(l.weight_type == MC_I4 ? bytes[i] & 0x0f0f0f0f : bytes[i]);
        put_columns(part, (float *)y + n);
        if (l.weight_type != MC_I4) continue;
        for (int i = 0; i < LANES; i++) part[i] = (Vf)((bytes[i] >> 4) & 0x0f0f0f0f);
        put_columns(part, (float *)(y + LANES * PANEL) + n);
    }
}

// Weights of rows n0.. as floats, chunk's order: y [chunk][PANEL]; `scales` and `shifts` are [blocks][PANEL].
static void unpack_floats(const Inputs &in, int64_t n0, int64_t k, const float *scales, const float *shifts, float *y) {
    const McLinear &l = *in.l;
    bool halves = l.weight_type == MC_I4;
    int64_t group = halves ? 2 * LANES : LANES, end = k + in.chunk < in.blocks * l.block ? k + in.chunk : in.blocks * l.block;
    int64_t width = in.blocks * l.block * bits_of(l.weight_type) / 8;
    bool threes = l.weight_type == MC_I3, tabled = l.table;
    Table table = table_of(l);
    auto value = [&](Vi code) { return tabled ? entries(table, code) : to_floats(halves ? code & 15 : code); };
    for (int64_t n = 0; n < PANEL; n += LANES)
        for (int64_t at = k; at < end; at += group) {
            const uint8_t *rows = (const uint8_t *)l.weight + (n0 + n) * width, *codes = rows + (halves ? at / 2 : at);
            const float *scale = scales + at / l.block * PANEL + n, *shift = shifts + at / l.block * PANEL + n;
            Vi bytes[LANES];
            Vf part[LANES];
            for (int i = 0; i < LANES; i++)
                bytes[i] = n0 + n + i >= l.N ? (Vi){}
                           : threes          ? widen_threes(rows + i * width, at)
                                             : widen_bytes(codes + i * width);
            float *to = y + (halves ? (at - k) / 2 : at - k) * PANEL + n;
            for (int i = 0; i < LANES; i++)
                part[i] = value(bytes[i]) * scale[i] + shift[i];
            put_columns(part, to);
            if (!halves) continue;
            for (int i = 0; i < LANES; i++) part[i] = value(bytes[i] >> 4) * scale[i] + shift[i];
            put_columns(part, to + in.chunk / 2 * PANEL);
        }
}

// The same of stored floats.
static void unpack_plain(const Inputs &in, int64_t n0, int64_t k, float *y) {
    const McLinear &l = *in.l;
    for (int64_t n = 0; n < PANEL; n += LANES)
        for (int64_t at = k; at < k + in.chunk; at += LANES) {
            Vf part[LANES];
            for (int i = 0; i < LANES; i++) {
                float row[LANES] = {};
                int64_t left = n0 + n + i < l.N ? l.K - at : 0;
                if (left > 0) widen_row(l.weight_type, l.weight, (n0 + n + i) * l.K + at, left < LANES ? left : LANES, row);
                part[i] = load(row);
            }
            put_columns(part, y + (at - k) * PANEL + n);
        }
}

#if defined(__AVX512BF16__)
// Stored bfloat16 as the pairs that they are: y [steps/2][PANEL]; what lies behind the end is zero.
static void unpack_pairs(const McLinear &l, int64_t n0, int64_t k, int64_t steps, uint32_t *y) {
    for (int64_t at = 0; at < steps; at += 2 * LANES)
        for (int64_t n = 0; n < PANEL; n += LANES) {
            Vf part[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t left = n0 + n + i < l.N ? 2 * (l.K - k - at) : 0;
                part[i] = (Vf)load_bytes((const uint16_t *)l.weight + (n0 + n + i) * l.K + k + at, left < 0 ? 0 : left);
            }
            put_columns(part, (float *)y + at / 2 * PANEL + n);
        }
}
#endif

// Scales and what is added to scale * code of rows n0..: [blocks][PANEL] each.
static void unpack_blocks(const Inputs &in, int64_t n0, float *scales, float *shifts) {
    const McLinear &l = *in.l;
    for (int64_t n = 0; n < PANEL; n++)
        for (int64_t b = 0; b < in.blocks; b += LANES) {
            int64_t count = in.blocks - b < LANES ? in.blocks - b : LANES;
            float scale[LANES] = {}, shift[LANES] = {};
            if (n0 + n < l.N) {
                Vf by = load_some(l.scales + (n0 + n) * in.blocks + b, count);
                store(scale, by);
                store(shift, shifts_of(l, n0 + n, b, in.blocks, count) - by * middle_of(l));
            }
            for (int64_t i = 0; i < count; i++)
                scales[(b + i) * PANEL + n] = scale[i], shifts[(b + i) * PANEL + n] = shift[i];
        }
}

// R rows of x from m on times unpacked codes, those of inputs `k` to `end`, 2*LANES columns: c += ...
template <int R>
static inline void codes_tile(const Inputs &in, int64_t m, int64_t k, int64_t end, const int32_t *codes,
                              const float *scales, float *c) {
    const McLinear &l = *in.l;
    bool halves = l.weight_type == MC_I4;
    int64_t together = l.block < in.chunk ? l.block : in.chunk;
    int64_t quads = together / (halves ? 8 : 4);
    Vf sum[R][2];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = load(c + r * PANEL + v * LANES);
    for (int64_t at = 0; k + at < end; at += together) {
        Vi dot[R][2] = {};
        for (int64_t half = 0; half <= halves; half++) {
            int64_t chunk = at / in.chunk * in.chunk, in_chunk = at - chunk;
            int64_t from = chunk / 4 + half * LANES + in_chunk / (halves ? 8 : 4);
            const int32_t *x = (const int32_t *)(in.codes + m * in.steps + k) + from;
            const int32_t *w = codes + from * PANEL;
            for (int64_t q = 0; q < quads; q++) {
                Vi w0 = load_int(w + q * PANEL), w1 = load_int(w + q * PANEL + LANES);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    Vi xs = all_int(x[r * (in.steps / 4) + q]);
                    dot[r][0] = dot4(dot[r][0], w0, xs);
                    dot[r][1] = dot4(dot[r][1], w1, xs);
                }
            }
        }
        int64_t b = (k + at) / l.block;
        Vf s0 = load(scales + b * PANEL), s1 = load(scales + b * PANEL + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float by = in.scales[(m + r) * in.blocks + b];
            sum[r][0] += to_floats(dot[r][0]) * (s0 * by);
            sum[r][1] += to_floats(dot[r][1]) * (s1 * by);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) store(c + r * PANEL + v * LANES, sum[r][v]);
}

static void codes_product(const Inputs &in, int64_t m0, int64_t rows, int64_t k, int64_t end, const int32_t *codes,
                          const float *scales, float *c) {
    constexpr int R = REGISTERS == 32 ? 6 : 2;
    for (int64_t v = 0; v < PANEL; v += 2 * LANES) {
        int64_t m = 0;
        for (; m + R <= rows; m += R) codes_tile<R>(in, m0 + m, k, end, codes + v, scales + v, c + m * PANEL + v);
        for (; m < rows; m++) codes_tile<1>(in, m0 + m, k, end, codes + v, scales + v, c + m * PANEL + v);
    }
}

// Vectors of PANEL numbers that a panel holds: floats of a chunk, or four codes each.
static inline int64_t panel_rows(const Inputs &in) {
    return in.chunk < CODES_TOGETHER / 4 ? CODES_TOGETHER / 4 : in.chunk;
}

static size_t many_bytes(const Inputs &in, int64_t together) {
    return 4 * (size_t)(PANEL * (panel_rows(in) * 2 + together + 2 * in.blocks)) + 4096;
}

static void many_task(void *data, size_t index) {
    const Many &p = *(const Many *)data;
    const Inputs &in = *p.in;
    const McLinear &l = *in.l;
    int64_t n0 = (int64_t)index / p.row_tasks * PANEL, m0 = (int64_t)index % p.row_tasks * p.together;
    int64_t rows = l.M - m0 < p.together ? l.M - m0 : p.together;
    bool coded = l.weight_type >= MC_I8, halves = l.weight_type == MC_I4;
    if (!scratch.reserve(many_bytes(in, p.together))) {
        __atomic_store_n(&in.no_memory, true, __ATOMIC_RELAXED);
        return;
    }
    float *c = scratch.take<float>((size_t)(p.together * PANEL)), *panel = scratch.take<float>((size_t)(panel_rows(in) * PANEL));
    float *scales = scratch.take<float>((size_t)(in.blocks * PANEL)), *shifts = scratch.take<float>((size_t)(in.blocks * PANEL));
    if (coded) unpack_blocks(in, n0, scales, shifts);
    int64_t end = coded ? in.blocks * l.block : l.K;
    if (in.codes) {
        product<float>(in.sums + m0 * in.blocks, in.blocks, 1, shifts, rows, in.blocks, c, PANEL, false);
        int64_t bytes = halves ? end / 2 : end;
        for (int64_t k = 0; k < end; k += CODES_TOGETHER) {
            int64_t to = k + CODES_TOGETHER < end ? k + CODES_TOGETHER : end;
            for (int64_t at = k; at < to; at += in.chunk)
                unpack_codes(in, n0, halves ? at / 2 : at, bytes, (int32_t *)panel + (at - k) / 4 * PANEL);
            codes_product(in, m0, rows, k, to, (const int32_t *)panel, scales, c);
        }
    } else {
#if defined(__AVX512BF16__)
        uint32_t *pairs = scratch.take<uint32_t>((size_t)(in.chunk / 2 * PANEL));
#endif
        for (int64_t k = 0; k < end; k += in.chunk) {
            int64_t left = end - k < in.chunk ? end - k : in.chunk;
#if defined(__AVX512BF16__)
            if (in.pairs && l.weight_type == MC_BF16) {
                unpack_pairs(l, n0, k, left, pairs);
                product<uint32_t>(in.pairs + (m0 * in.steps + k) / 2, in.steps / 2, 1, pairs, rows, (left + 1) / 2, c, PANEL, k);
                continue;
            }
#endif
            if (coded) unpack_floats(in, n0, k, scales, shifts, panel);
            else unpack_plain(in, n0, k, panel);
            int64_t parts = halves ? 2 : 1, steps = left / parts;
            for (int64_t part = 0; part < parts; part++) {
                const float *w = panel + part * in.chunk / 2 * PANEL;
                int64_t at = m0 * in.steps + k + part * in.chunk / 2;
                bool add = k || part;
#if defined(__AVX512BF16__)
                if (in.pairs) {
                    // what is behind the end is zero on both sides
                    pair_rows(w, (steps + 1) / 2 * 2, pairs);
                    product<uint32_t>(in.pairs + at / 2, in.steps / 2, 1, pairs, rows, (steps + 1) / 2, c, PANEL, add);
                    continue;
                }
#endif
                product<float>(in.floats + at, in.steps, 1, w, rows, steps, c, PANEL, add);
            }
        }
    }
    float bias[PANEL] = {};
    int64_t columns = l.N - n0 < PANEL ? l.N - n0 : PANEL;
    for (int64_t n = 0; l.bias && n < columns; n++) bias[n] = l.bias[n0 + n];
    for (int64_t m = 0; m < rows; m++) {
        float *y = l.out + (m0 + m) * l.N + n0;
        const float *from = c + m * PANEL;
        int64_t n = 0;
        for (; n + LANES <= columns; n += LANES) store(y + n, load(from + n) + load(bias + n));
        for (; n < columns; n++) y[n] = from[n] + bias[n];
    }
}

}  // namespace MC_ISA
