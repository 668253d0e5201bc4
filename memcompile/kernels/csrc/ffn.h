// One gated feed-forward layer for one token a row, over some of its neurons:
// out = sum over chosen i of act(gate_i . x) * (up_i . x) * down_i.
#pragma once
#include "host.h"

#pragma GCC visibility push(default)
extern "C" {

enum McActivation : int32_t { MC_SILU = 0, MC_GELU = 1, MC_GELU_TANH = 2, MC_RELU = 3 };

struct McFfn {
    int64_t B, M, F, keep;       // rows, model width, neurons, neurons that are kept
    const float *x;              // [B,M]
    const float *gate, *up, *down;  // [F,M]: a row is a neuron, `down` too
    const float *counts;         // [B,F]: the neurons with the largest counts; null: with the largest |act(gate . x)|
    float *out;                  // [B,M]
    int32_t activation;
    McParallel parallel;         // null: threads of our own
    void *host;
    int32_t threads;
};

// 0: done; else a reason, see `mc_reason`. A row without any count looks at every neuron.
int32_t mc_ffn(const McFfn *call);
}
#pragma GCC visibility pop
