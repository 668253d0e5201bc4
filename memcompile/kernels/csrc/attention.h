// One attention call: what every host (torch, ONNX Runtime, TVM, numpy) fills in and every kernel reads.
// Shapes: B batch, T queries, S key slots, H query heads, G key/value heads, D head width.
#pragma once
#include "host.h"

#pragma GCC visibility push(default)
extern "C" {

// Strides count elements (bytes for MC_I4 rows are D/2); the channels of a row are adjacent.
struct McTensor {
    void *data;
    int64_t batch, head, token;
};

struct McAttention {
    int64_t B, T, S, H, G, D;
    McTensor q, k, v, out;        // q, out: q_type; k, v: kv_type
    int32_t q_type, kv_type;
    float scale, softcap;         // softcap 0: none
    int64_t causal, window, sinks, block, stride;  // as memcompile::attention
    const int64_t *key_positions;    // [B,S], -1: empty slot; null: slot number
    const int64_t *query_positions;  // [B,T]; null: the last T of the row's used slots
    int64_t positions_stride;        // between the rows of key_positions; 0: one row for all
    const int32_t *used;             // [B] slots in use, the queries' own keys included; null: S
    const float *k_scale, *v_scale;  // [G*D] for MC_I8 and MC_I4
    const float *k_token_scale, *v_token_scale;  // [B,G,S], instead of or beside the ones a channel
    const uint8_t *blocks;           // [B,H,ceil(T/n),ceil(S/n)] of n = block_tokens; 0: skipped
    int64_t block_tokens, blocks_batch, blocks_head;
    const int32_t *slots;            // [B,G,slot_count] chosen slots, -1: none; decode only
    int64_t slot_count;
    const int32_t *pattern;          // [H,4] what each head chooses when a prompt is read (select.h); or null
    int64_t pattern_from;            // calls with at most so many slots in use are dense
    McTensor bounds;                 // of pages of keys (pages.h), stored as kv_type; `token`: page stride
    int64_t page_tokens, page_keep;  // one query looks at so many pages
    int64_t page_from;               // rows with at most so many slots in use are dense
    float *lse;                      // [B,H,T] log-sum-exp of the scaled scores, or null
    McParallel parallel;             // null: threads of our own
    void *host;
    int32_t threads;
    int32_t splits;                  // decode: parts a key/value head is cut into; 0: chosen
    int32_t key_tile;                // prefill: keys a tile, 16..128; 0: chosen
    int32_t products;                // MC_BF16: both sides of a product may be rounded to bfloat16
};

struct McAppend {
    int64_t B, T, G, D;
    McTensor k, v, past_k, past_v;   // k, v: type; past: cache_type
    int32_t type, cache_type;
    const int32_t *used;             // [B] slots in use, the new ones included
    const float *k_scale, *v_scale;
};

// Bring the bounds of pages up to date with keys that are appended (memcompile/dialect/pages.py).
struct McPages {
    int64_t B, T, G, D;
    McTensor k, bounds;              // k: type; bounds: cache_type, the largest values and then the smallest
    int32_t type, cache_type;
    int64_t page_tokens;
    const int32_t *used;             // [B] slots in use, the new ones included
    const float *k_scale;
};

// 0: done; else a reason, see `mc_reason`.
int32_t mc_attention(const McAttention *call);
int32_t mc_append(const McAppend *call);
int32_t mc_page_bounds(const McPages *call);
}
#pragma GCC visibility pop
