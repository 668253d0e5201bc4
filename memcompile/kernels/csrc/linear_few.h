// A linear layer over a few rows of x: bound by the bytes of the weight, which are read once, where they lie.
// A vector lane is an input; the codes of 4 bits are multiplied as they come out of their bytes.
#pragma once
#include "linear_inputs.h"
#include "rows.h"

namespace MC_ISA {

constexpr int64_t AHEAD = 4096;  // bytes
constexpr int FEW = 4;  // rows of x that share one reading of the weight

struct Few {
    const Inputs *in;
    int64_t rows_together;  // rows of the weight in a task
};

// The code that stands for zero where a block has no zero point.
static inline float middle_of(const McLinear &l) { return l.table ? 0.0f : l.weight_type == MC_I4 ? 8.0f : 128.0f; }

// The table of a weight that has one, otherwise of what codes of 4 bits stand for.
static inline Table table_of(const McLinear &l) {
    float centred[16];
    for (int i = 0; i < 16; i++) centred[i] = (float)(i - 8);
    return l.table ? load_table(l.table, 1 << bits_of(l.weight_type)) : load_table(centred, 16);
}

// What is added to scale * (code - middle), for `count`, up to LANES, blocks of a row from block b on.
static inline Vf shifts_of(const McLinear &l, int64_t n, int64_t b, int64_t blocks, int64_t count) {
    Vf shift = l.offsets ? load_some(l.offsets + n * blocks + b, count) : (Vf){};
    if (!l.zero_points) return shift;
    bool four = l.weight_type == MC_I4;
    const uint8_t *p = l.zero_points + n * (four ? (blocks + 1) / 2 : blocks) + (four ? b / 2 : b);
    float zero[LANES] = {};
    for (int64_t i = 0; i < count; i++) zero[i] = (float)(four ? p[i / 2] >> i % 2 * 4 & 15 : p[i]);
    return shift - load_some(l.scales + n * blocks + b, count) * (load(zero) - middle_of(l));
}

// The shifts of N rows of the weight, times the blocks' sums of R rows of x.
template <int N, int R> static inline void add_shifts(const Inputs &in, int64_t n, int64_t m, Vf (&sum)[N][R]) {
    const McLinear &l = *in.l;
    if (!l.offsets && !l.zero_points) return;
    for (int64_t b = 0; b < in.blocks; b += LANES) {
        int64_t count = in.blocks - b < LANES ? in.blocks - b : LANES;
        for (int i = 0; i < N; i++) {
            Vf shift = shifts_of(l, n + i, b, in.blocks, count);
            for (int r = 0; r < R; r++) sum[i][r] += shift * load_some(in.sums + (m + r) * in.blocks + b, count);
        }
    }
}

// A vector of codes of each row; `left` bytes and `count` blocks of it are there.
template <int TYPE, int N, int R>
static inline __attribute__((always_inline)) void codes_chunk(const Inputs &in, const uint8_t *codes, int64_t width, int64_t ahead,
                                                              const float *scales, int64_t m, int64_t k, int64_t left,
                                                              int64_t b, int64_t count, Vi from, Vf (&sum)[N][R]) {
    Vi low[N], high[N];
    Vf scale[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        __builtin_prefetch(codes + i * width + ahead);
        Vi bytes = load_bytes(codes + i * width, left);
        low[i] = TYPE == MC_I4 ? bytes & 0x0f0f0f0f : bytes;
        high[i] = (bytes >> 4) & 0x0f0f0f0f;
        scale[i] = load_some(scales + i * in.blocks, count);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const int32_t *x = (const int32_t *)(in.codes + (m + r) * in.steps + k);
        Vi x_low = load_int(x), x_high = TYPE == MC_I4 ? load_int(x + LANES) : (Vi){};
        Vi middle = load_int(in.middles + ((m + r) * in.steps + k) / in.chunk * LANES);
        Vf step = load_some(in.scales + (m + r) * in.blocks + b, count);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            Vi dot = dot4(middle, low[i], x_low);
            if constexpr (TYPE == MC_I4) dot = dot4(dot, high[i], x_high);
            sum[i][r] += to_floats(dot) * permute(scale[i] * step, from);
        }
    }
}

// Codes times codes, in whole numbers within a block: N rows of the weight, R of x.
template <int TYPE, int N, int R> static void few_codes(const Inputs &in, int64_t n, int64_t m, Vf (&sum)[N][R]) {
    const McLinear &l = *in.l;
    constexpr int64_t CHUNK = TYPE == MC_I4 ? LANES * 8 : LANES * 4, BYTES = LANES * 4;
    int64_t width = in.blocks * l.block * BYTES / CHUNK;
    const uint8_t *codes = (const uint8_t *)l.weight + n * width;
    const float *scales = l.scales + n * in.blocks;
    int64_t in_chunk = l.block < CHUNK ? CHUNK / l.block : 1;  // blocks
    Vi from;
    for (int i = 0; i < LANES; i++) from[i] = i / (int32_t)(LANES / in_chunk);
    // rows that are read side by side hide from the hardware's prefetching that they follow each other
    int64_t ahead = round_up(AHEAD, N * width);
    Vf held[N][R] = {};
    int64_t at = 0, k = 0;
    for (; at + BYTES <= width; k += CHUNK, at += BYTES) {
        int64_t b = k / l.block;
        codes_chunk<TYPE, N, R>(in, codes + at, width, ahead, scales + b, m, k, BYTES, b, in_chunk, from, held);
    }
    if (at < width) {
        int64_t b = k / l.block;
        codes_chunk<TYPE, N, R>(in, codes + at, width, ahead, scales + b, m, k, width - at, b, in.blocks - b, from, held);
    }
    add_shifts<N, R>(in, n, m, held);
    for (int i = 0; i < N; i++)
        for (int r = 0; r < R; r++) sum[i][r] = held[i][r];
}

// LANES bytes of codes as floats, less the code in the middle; of 3 bits the LANES codes from weight k of a row on.
template <int TYPE, bool TABLE>
static inline void values_of(const uint8_t *row, int64_t k, const Table &table, Vf &low, Vf &high) {
    if constexpr (TYPE == MC_I3) {
        low = entries(table, widen_threes(row, k));
    } else if constexpr (TYPE == MC_I8) {
        low = to_floats(widen_bytes(row + k) - 128);
    } else {
        Vi bytes = widen_bytes(row + k / 2);
        if constexpr (TABLE || LANES == 16) low = entries(table, bytes), high = entries(table, bytes >> 4);
        else low = low_codes(bytes), high = high_codes(bytes);
    }
}

// Codes times floats.
template <int TYPE, bool TABLE, int N, int R> static void few_floats(const Inputs &in, int64_t n, int64_t m, Vf (&sum)[N][R]) {
    const McLinear &l = *in.l;
    constexpr int64_t CHUNK = TYPE == MC_I4 ? LANES * 8 : LANES * 4;
    constexpr int64_t GROUP = TYPE == MC_I4 ? LANES * 2 : LANES;  // weights that are taken at once
    int64_t width = in.blocks * l.block * bits_of(TYPE) / 8;
    Table table = table_of(l);
    const uint8_t *codes = (const uint8_t *)l.weight + n * width;
    int64_t ahead = round_up(AHEAD, N * width);
    Vf held[N][R] = {};
    for (int64_t b = 0; b < in.blocks; b++) {
        Vf block[N][R] = {};
        for (int64_t k = b * l.block; k < (b + 1) * l.block; k += GROUP) {
            int64_t at = TYPE == MC_I4 ? k / CHUNK * CHUNK + k % CHUNK / 2 : k;
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                Vf low = {}, high = {};
                const uint8_t *row = codes + i * width;
                __builtin_prefetch(row + k * bits_of(TYPE) / 8 + ahead);
                values_of<TYPE, TABLE>(row, k, table, low, high);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const float *x = in.floats + (m + r) * in.steps + at;
                    block[i][r] += low * load(x);
                    if constexpr (TYPE == MC_I4) block[i][r] += high * load(x + CHUNK / 2);
                }
            }
        }
        for (int i = 0; i < N; i++)
            for (int r = 0; r < R; r++) held[i][r] += block[i][r] * l.scales[(n + i) * in.blocks + b];
    }
    add_shifts<N, R>(in, n, m, held);
    for (int i = 0; i < N; i++)
        for (int r = 0; r < R; r++) sum[i][r] = held[i][r];
}

// Stored floats times floats.
template <int TYPE, int N, int R> static void few_plain(const Inputs &in, int64_t n, int64_t m, Vf (&sum)[N][R]) {
    const McLinear &l = *in.l;
    Vf held[N][R] = {};
    for (int64_t k = 0; k < l.K; k += LANES)
        for (int i = 0; i < N; i++) {
            int64_t at = (n + i) * l.K + k;
            Vf w;
            if (k + LANES <= l.K)
                w = TYPE == MC_F32 ? load((const float *)l.weight + at) : widen_bf16((const uint16_t *)l.weight + at);
            else {
                float rest[LANES] = {};
                widen_row(TYPE, l.weight, at, l.K - k, rest);
                w = load(rest);
            }
            for (int r = 0; r < R; r++) held[i][r] += w * load(in.floats + (m + r) * in.steps + k);
        }
    for (int i = 0; i < N; i++)
        for (int r = 0; r < R; r++) sum[i][r] = held[i][r];
}

template <int TYPE, int N, int R> static void few_sums(const Inputs &in, int64_t n, int64_t m, Vf (&sum)[N][R]) {
    if constexpr (TYPE == MC_F32 || TYPE == MC_BF16) few_plain<TYPE, N, R>(in, n, m, sum);
    else if constexpr (TYPE == MC_I3) few_floats<TYPE, true, N, R>(in, n, m, sum);
    else if (in.codes) few_codes<TYPE, N, R>(in, n, m, sum);
    else if (TYPE == MC_I4 && in.l->table) few_floats<TYPE, TYPE == MC_I4, N, R>(in, n, m, sum);
    else few_floats<TYPE, false, N, R>(in, n, m, sum);
}

template <int TYPE, int R> static void few_rows(const Inputs &in, int64_t n0, int64_t n1, int64_t m) {
    const McLinear &l = *in.l;
    constexpr int N = TYPE < MC_I8 ? 1 : R == 1 ? 4 : 2;  // rows of the weight that share what is read of x
    for (int64_t n = n0; n < n1; n += LANES) {
        Vf sums_of[R][LANES] = {};
        int64_t count = n1 - n < LANES ? n1 - n : LANES, i = 0;
        for (; i + N <= count; i += N) {
            Vf sum[N][R];
            few_sums<TYPE, N, R>(in, n + i, m, sum);
            for (int j = 0; j < N; j++)
                for (int r = 0; r < R; r++) sums_of[r][i + j] = sum[j][r];
        }
        for (; i < count; i++) {
            Vf sum[1][R];
            few_sums<TYPE, 1, R>(in, n + i, m, sum);
            for (int r = 0; r < R; r++) sums_of[r][i] = sum[0][r];
        }
        for (int r = 0; r < R; r++) {
            float *y = l.out + (m + r) * l.N + n, row[LANES];
            store(row, sums(sums_of[r]));
            for (int64_t i = 0; i < count; i++) y[i] = row[i] + (l.bias ? l.bias[n + i] : 0.0f);
        }
    }
}

template <int TYPE> static void few_of_type(const Inputs &in, int64_t n0, int64_t n1) {
    int64_t m = 0;
    for (; m + FEW <= in.l->M; m += FEW) few_rows<TYPE, FEW>(in, n0, n1, m);
    for (; m < in.l->M; m++) few_rows<TYPE, 1>(in, n0, n1, m);
}

static void few_task(void *data, size_t index) {
    const Few &f = *(const Few *)data;
    const Inputs &in = *f.in;
    int64_t n0 = (int64_t)index * f.rows_together, n1 = n0 + f.rows_together;
    if (n1 > in.l->N) n1 = in.l->N;
    switch (in.l->weight_type) {
    case MC_F32: return few_of_type<MC_F32>(in, n0, n1);
    case MC_BF16: return few_of_type<MC_BF16>(in, n0, n1);
    case MC_I8: return few_of_type<MC_I8>(in, n0, n1);
    case MC_I3: return few_of_type<MC_I3>(in, n0, n1);
    default: return few_of_type<MC_I4>(in, n0, n1);
    }
}

}  // namespace MC_ISA
