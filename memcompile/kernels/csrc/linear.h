// One linear layer: out [M,N] = x [M,K] times the transpose of a weight [N,K], plus a bias.
#pragma once
#include "host.h"

#pragma GCC visibility push(default)
extern "C" {

struct McLinear {
    int64_t M, N, K;
    const float *x;               // [M,K], rows adjacent
    float *out;                   // [M,N], rows adjacent
    const void *weight;           // MC_F32, MC_BF16: [N,K]; MC_I8, MC_I4, MC_I3: codes [N,blocks,block*bits/8]
    int32_t weight_type;
    int32_t block;                // weights of K that share a scale: 32, 64, 128 or 256
    const float *scales;          // [N,blocks]; a weight is scale * (code - zero) + offset
    const uint8_t *zero_points;   // [N,ceil(blocks*bits/8)] packed as codes are; null: half the codes' range
    const float *offsets;         // [N,blocks] or null
    const float *table;           // [2**bits] or null: a weight is scale * table[code]; for MC_I4, and always for
                                  // MC_I3, without zero points and offsets, and not with activations MC_I8
    const float *bias;            // [N] or null
    int32_t activations;          // MC_F32: exact; MC_BF16: x and weights may be rounded to bfloat16 when M is
                                  // large; MC_I8: each block of x is rounded to 127 steps either side of zero
    McParallel parallel;          // null: threads of our own
    void *host;
    int32_t threads;
};

// 0: done; else a reason, see `mc_reason`.
int32_t mc_linear(const McLinear *call);
}
#pragma GCC visibility pop
