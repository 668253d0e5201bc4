// The kernels as a function that TVM's code calls: linked into the artifact's library, memory in its layouts.
#include "attention.h"
#include "threads.h"

#include <vector>

// TVM's own threads: of libtvm_runtime, which the process has loaded, or missing outside of TVM.
struct TVMParallelGroupEnv {
    void *sync_handle;
    int32_t num_task;
};
extern "C" __attribute__((weak)) int TVMBackendParallelLaunch(int (*)(int, TVMParallelGroupEnv *, void *),
                                                              void *, int);

namespace {

struct Shared {
    McTask task;
    void *data;
    size_t count, next;
};

int take(int, TVMParallelGroupEnv *, void *p) {
    Shared *s = (Shared *)p;
    for (;;) {
        size_t i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (i >= s->count) return 0;
        s->task(s->data, i);
    }
}

void run_on_tvm(void *, McTask task, size_t count, void *data) {
    Shared shared = {task, data, count, 0};
    // 0: as many threads as the pool has
    TVMBackendParallelLaunch(take, &shared, 0);
}

McTensor packed(const void *data, int64_t heads, int64_t tokens, int64_t width) {
    return {(void *)data, heads * tokens * width, tokens * width, width};
}

}  // namespace

// q, out [B,H,T,D], k, v [B,G,T,D] float32; caches [B,G,C,W], the new tokens go to slots first[b] + t;
// positions [B,S], S <= C; query_at [B,T]. `bits` 0: k_scale, v_scale are ignored; `pattern_block` 0: pattern.
// Gives 0, or a reason, see `mc_reason`.
extern "C" __attribute__((visibility("default"))) int32_t mc_tvm_attention(
    const void *q, const void *k, const void *v, void *cache_k, void *cache_v, const void *positions,
    const void *query_at, const void *first, const void *k_scale, const void *v_scale, const void *pattern,
    void *out, int64_t B, int64_t T, int64_t C, int64_t S, int64_t H, int64_t G, int64_t D, float scale,
    float softcap, int64_t causal, int64_t window, int64_t sinks, int64_t block, int64_t stride, int64_t bits,
    int64_t pattern_block, int64_t pattern_from, int64_t key_tile, int64_t splits) {
    std::vector<int32_t> used((size_t)B);
    for (int64_t b = 0; b < B; b++) {
        int64_t slots = ((const int64_t *)first)[b] + T;
        if (slots < 0 || slots > S || S > C) return 4;  // as mc_attention for sizes that do not fit
        used[(size_t)b] = (int32_t)slots;
    }
    int32_t type = bits == 8 ? MC_I8 : bits == 4 ? MC_I4 : MC_F32;
    int64_t stored = bits == 4 ? D / 2 : D;
    McAppend a{};
    a.B = B, a.T = T, a.G = G, a.D = D, a.type = MC_F32, a.cache_type = type, a.used = used.data();
    a.k = packed(k, G, T, D), a.v = packed(v, G, T, D);
    a.past_k = packed(cache_k, G, C, stored), a.past_v = packed(cache_v, G, C, stored);
    if (bits) a.k_scale = (const float *)k_scale, a.v_scale = (const float *)v_scale;
    if (int32_t code = mc_append(&a)) return code;

    McAttention c{};
    c.B = B, c.T = T, c.S = S, c.H = H, c.G = G, c.D = D;
    c.q = packed(q, H, T, D), c.out = packed(out, H, T, D), c.k = a.past_k, c.v = a.past_v;
    c.q_type = MC_F32, c.kv_type = type, c.scale = scale, c.softcap = softcap;
    c.causal = causal, c.window = window, c.sinks = sinks, c.block = block, c.stride = stride;
    c.key_positions = (const int64_t *)positions, c.positions_stride = S;
    c.query_positions = (const int64_t *)query_at;
    c.used = used.data(), c.k_scale = a.k_scale, c.v_scale = a.v_scale;
    if (pattern_block) {
        c.pattern = (const int32_t *)pattern;
        c.block_tokens = pattern_block, c.pattern_from = pattern_from;
    }
    c.key_tile = (int32_t)key_tile, c.splits = (int32_t)splits;
    c.threads = processor_threads();
    if (TVMBackendParallelLaunch) c.parallel = run_on_tvm;
    return mc_attention(&c);
}
