// The rows of x as the products read them: filled up to whole chunks of codes, in the order in which codes
// come out of a chunk, as floats, pairs of bfloat16, or int8 codes.
#pragma once
#include "linear.h"
#include "rows.h"
#include "scratch.h"
#include "vector.h"

namespace MC_ISA {

// Weights of a row that are unpacked together; of codes, those that one vector of bytes holds. Of a chunk of 4-bit
// codes the even ones (the low halves of the bytes) come first, then the odd ones; all others keep their order.
static inline int64_t chunk_of(int32_t weight_type) { return weight_type == MC_I8 ? LANES * 4 : LANES * 8; }

static inline int64_t bits_of(int32_t weight_type) { return weight_type == MC_I8 ? 8 : weight_type == MC_I4 ? 4 : 3; }

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Inputs {
    const McLinear *l;
    int64_t chunk, steps, blocks;  // steps: K in whole chunks; blocks: of a row of the weight
    float *floats;                 // [M][steps], or null
    uint32_t *pairs;               // [M][steps/2] of bfloat16, or null
    int8_t *codes;                 // [M][steps], or null; then
    float *scales;                 // [M][blocks]: the step of a block
    float *sums;                   // [M][blocks] of what stands for x, or null
    int32_t *middles;              // [M][chunks][LANES]: dot products of x with the codes' middle, or null
    mutable bool no_memory;
};

// What is left of x, at most a chunk, in a chunk's order; the rest of the chunk is zero.
template <class X> static void put_chunk(const X *x, int64_t count, int64_t chunk, bool halves, X *y) {
    count = count < 0 ? 0 : count < chunk ? count : chunk;
    if (!halves) {
        for (int64_t i = 0; i < count; i++) y[i] = x[i];
        for (int64_t i = count; i < chunk; i++) y[i] = 0;
        return;
    }
    for (int64_t i = 0; i < count / 2; i++) y[i] = x[2 * i], y[chunk / 2 + i] = x[2 * i + 1];
    for (int64_t i = count / 2; i < chunk / 2; i++) y[i] = y[chunk / 2 + i] = 0;
    if (count % 2) y[count / 2] = x[count - 1];
}

// Each block of a row in 127 steps either side of zero, in the order of K; LANES blocks at a time.
static void round_row(const Inputs &in, int64_t m, const float *x, int8_t *rounded) {
    int64_t block = in.l->block, K = in.l->K;
    for (int64_t b = 0; b < in.blocks; b += LANES) {
        int64_t count = in.blocks - b < LANES ? in.blocks - b : LANES;
        Vf part[LANES] = {};
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = (b + i) * block; k < K && k < (b + i + 1) * block; k += LANES)
                part[i] = larger((Vf)((Vi)load_some(x + k, K - k) & 0x7fffffff), part[i]);
        Vf largest = joined(part, larger), step = largest / 127.0f, by = largest > 0.0f ? 127.0f / largest : (Vf){};
        for (int64_t i = 0; i < count; i++) {
            Vi sum = {};
            // zeros behind the last value fill up its chunk
            for (int64_t k = (b + i) * block; k < K && k < (b + i + 1) * block; k += LANES) {
                Vi codes = to_ints(load_some(x + k, K - k) * by[i]);
                store_bytes(rounded + k, codes);
                sum += codes;
            }
            part[i] = to_floats(sum);
        }
        Vf total = step * sums(part);
        for (int64_t i = 0; i < count; i++) {
            in.scales[m * in.blocks + b + i] = step[i];
            in.sums[m * in.blocks + b + i] = total[i];
        }
    }
}

// Start values of a chunk's dot products that make its codes count from their middle.
static void subtract_middles(const Inputs &in, int64_t m) {
    bool halves = in.l->weight_type == MC_I4;
    const int8_t *x = in.codes + m * in.steps;
    for (int64_t k = 0; k < in.steps; k += in.chunk)
        for (int64_t i = 0; i < LANES; i++) {
            int32_t sum = 0;
            for (int64_t j = 0; j < 4; j++)
                sum += x[k + 4 * i + j] + (halves ? x[k + in.chunk / 2 + 4 * i + j] : 0);
            in.middles[(m * in.steps + k) / in.chunk * LANES + i] = -sum * (halves ? 8 : 128);
        }
}

static void sum_blocks(const Inputs &in, int64_t m, const float *x) {
    for (int64_t b = 0; b < in.blocks; b++) {
        int64_t from = b * in.l->block, to = from + in.l->block < in.l->K ? from + in.l->block : in.l->K;
        float sum = 0;
        for (int64_t k = from; k < to; k++) sum += x[k];
        in.sums[m * in.blocks + b] = sum;
    }
}

static void arrange_task(void *data, size_t index) {
    const Inputs &in = *(const Inputs *)data;
    int64_t m = (int64_t)index, K = in.l->K;
    const float *x = in.l->x + m * K;
    bool halves = in.l->weight_type == MC_I4;
    if (!in.floats && !scratch.reserve((size_t)in.steps * 4)) {
        __atomic_store_n(&in.no_memory, true, __ATOMIC_RELAXED);
        return;
    }
    if (in.codes) {
        int8_t *rounded = scratch.take<int8_t>((size_t)in.steps);
        round_row(in, m, x, rounded);
        for (int64_t k = 0; k < in.steps; k += in.chunk)
            put_chunk(rounded + k, K - k, in.chunk, halves, in.codes + m * in.steps + k);
        if (in.middles) subtract_middles(in, m);
        return;
    }
    float *row = in.floats ? in.floats + m * in.steps : scratch.take<float>((size_t)in.steps);
    for (int64_t k = 0; k < in.steps; k += in.chunk)
        put_chunk(x + k, K - k, in.chunk, halves, row + k);
    if (in.sums) sum_blocks(in, m, x);
    if (in.pairs) narrow_row(MC_BF16, row, in.steps, in.pairs, m * in.steps);
}

}  // namespace MC_ISA
