// The attention kernels as custom operators of ONNX Runtime, domain "memcompile": Attention (float32 cache),
// AttentionBFloat16, AttentionInt8 and AttentionInt4 (codes); and the registration of all operators.
#include "attention.h"
#include "onnxruntime.h"

#include <cstring>
#include <vector>

// of onnxruntime_linear.cpp and onnxruntime_ffn.cpp
const void *quantized_linear_operator();
const void *bfloat16_linear_operator();
const void *sparse_ffn_operator();

namespace {

enum Input { Q, K, V, PAST_K, PAST_V, LAST_SLOT, SLOTS, POSITIONS, K_SCALE, V_SCALE, PATTERN, BOUNDS, INPUTS };
enum Output { OUT, PRESENT_K, PRESENT_V, OUTPUTS };

struct Kernel {
    const OrtApi *api;
    int32_t cache_type;
    int64_t heads = 0, kv_heads = 0, causal = 1, window = 0, sinks = 0, block = 0, stride = 0;
    int64_t block_tokens = 0, pattern_from = 0, splits = 0, key_tile = 0;
    int64_t page_tokens = 0, page_keep = 0, page_from = 0, products = MC_F32;
    float scale = 0, softcap = 0;
};

size_t element_bytes(int32_t type) { return type == MC_F32 ? 4 : type == MC_BF16 ? 2 : 1; }

OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const Kernel &op = *(const Kernel *)kernel;
    Calls call{op.api};
    Tensor in[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) in[i] = input(call, context, i);
    if (call.status) return call.status;
    int64_t B = in[Q].dims[0], T = in[Q].dims[1], D = op.heads ? in[Q].dims[2] / op.heads : 0;
    int64_t capacity = in[PAST_K].dims[2], slots = *(const int32_t *)in[SLOTS].data;
    int64_t stored = op.cache_type == MC_I4 ? D / 2 : D;
    if (in[Q].rank != 3 || in[PAST_K].rank != 4 || in[PAST_K].dims[0] != B || in[PAST_K].dims[1] != op.kv_heads ||
        in[PAST_K].dims[3] != stored || in[K].dims[2] != op.kv_heads * D || in[V].dims[2] != op.kv_heads * D ||
        in[LAST_SLOT].dims[0] != B)
        return create_status(op.api, "memcompile.Attention: the sizes of its inputs do not fit together");
    if (slots > capacity)
        return create_status(op.api, "memcompile.Attention: more slots are in use than the cache has");
    if (in[POSITIONS].data && in[POSITIONS].dims[1] != slots)
        return create_status(op.api, "memcompile.Attention: positions need one column a slot in use");
    Tensor out = output(call, context, OUT, in[Q]);
    Tensor present[2] = {output(call, context, PRESENT_K, in[PAST_K]), output(call, context, PRESENT_V, in[PAST_V])};
    if (call.status) return call.status;
    size_t element = element_bytes(op.cache_type);
    for (int i = 0; i < 2; i++) {
        const Tensor &past = in[PAST_K + i];
        // the runtime binds one buffer as both; without that the cache is copied
        if (past.data != present[i].data)
            memcpy(present[i].data, past.data, (size_t)(B * op.kv_heads * capacity * stored) * element);
    }
    std::vector<int32_t> used((size_t)B);
    for (int64_t b = 0; b < B; b++) used[(size_t)b] = ((const int32_t *)in[LAST_SLOT].data)[b] + 1;

    auto packed = [&](void *data, int64_t heads) { return McTensor{data, T * heads * D, D, heads * D}; };
    auto cache = [&](void *data) {
        return McTensor{data, op.kv_heads * capacity * stored, capacity * stored, stored};
    };
    const float *k_scale = (const float *)in[K_SCALE].data, *v_scale = (const float *)in[V_SCALE].data;
    McAppend a{};
    a.B = B, a.T = T, a.G = op.kv_heads, a.D = D;
    a.k = packed(in[K].data, op.kv_heads), a.v = packed(in[V].data, op.kv_heads);
    a.past_k = cache(present[0].data), a.past_v = cache(present[1].data);
    a.type = MC_F32, a.cache_type = op.cache_type, a.used = used.data(), a.k_scale = k_scale, a.v_scale = v_scale;
    int32_t code = mc_append(&a);
    if (code) return create_status(op.api, mc_reason(code));

    Host host{op.api, context};
    McAttention c{};
    c.B = B, c.T = T, c.S = slots, c.H = op.heads, c.G = op.kv_heads, c.D = D;
    c.q = packed(in[Q].data, op.heads), c.out = packed(out.data, op.heads);
    c.k = a.past_k, c.v = a.past_v;
    c.q_type = MC_F32, c.kv_type = op.cache_type;
    c.scale = op.scale, c.softcap = op.softcap, c.causal = op.causal;
    c.window = op.window, c.sinks = op.sinks, c.block = op.block, c.stride = op.stride;
    c.key_positions = (const int64_t *)in[POSITIONS].data;
    c.positions_stride = slots;
    c.used = used.data(), c.k_scale = k_scale, c.v_scale = v_scale;
    if (in[PATTERN].data) {
        if (in[PATTERN].dims[0] != op.heads || in[PATTERN].dims[1] != 4)
            return create_status(op.api, "memcompile.Attention: a pattern is four numbers a head");
        c.pattern = (const int32_t *)in[PATTERN].data, c.pattern_from = op.pattern_from;
        c.block_tokens = op.block_tokens;
    }
    if (in[BOUNDS].data) {
        int64_t pages = in[BOUNDS].dims[2];
        if (in[BOUNDS].dims[3] != 2 * stored || pages * op.page_tokens < slots)
            return create_status(op.api, "memcompile.Attention: the bounds do not have a row for every page");
        c.bounds = {in[BOUNDS].data, op.kv_heads * pages * 2 * stored, pages * 2 * stored, 2 * stored};
        c.page_tokens = op.page_tokens, c.page_keep = op.page_keep, c.page_from = op.page_from;
    }
    c.parallel = run_on_host, c.host = &host;
    c.threads = processor_threads();
    c.splits = (int32_t)op.splits, c.key_tile = (int32_t)op.key_tile, c.products = (int32_t)op.products;
    code = mc_attention(&c);
    return code ? create_status(op.api, mc_reason(code)) : nullptr;
}

OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **made) {
    Kernel *k = new Kernel;
    k->api = api;
    k->cache_type = ((const Operator *)op)->type;
    struct {
        const char *name;
        int64_t *value;
    } ints[] = {{"num_heads", &k->heads}, {"kv_num_heads", &k->kv_heads}, {"causal", &k->causal},
                {"window", &k->window}, {"sinks", &k->sinks}, {"block", &k->block}, {"stride", &k->stride},
                {"block_tokens", &k->block_tokens}, {"pattern_from", &k->pattern_from}, {"splits", &k->splits}, {"key_tile", &k->key_tile},
                {"page_tokens", &k->page_tokens}, {"page_keep", &k->page_keep}, {"page_from", &k->page_from}, {"products", &k->products}};
    // an attribute that is not there keeps its default
    for (auto &attribute : ints) drop(api, integer(api, info, attribute.name, attribute.value));
    drop(api, real(api, info, "scale", &k->scale));
    drop(api, real(api, info, "softcap", &k->softcap));
    if (k->heads < 1 || k->kv_heads < 1 || k->heads % k->kv_heads || !(k->scale > 0)) {
        delete k;
        return create_status(api, "memcompile.Attention: num_heads, kv_num_heads or scale is missing or wrong");
    }
    *made = k;
    return nullptr;
}

int input_type(const OrtCustomOp *op, size_t index) {
    switch (index) {
    case PAST_K: case PAST_V: case BOUNDS: return ((const Operator *)op)->cache;
    case LAST_SLOT: case SLOTS: case PATTERN: return INT32;
    case POSITIONS: return INT64;
    default: return FLOAT;
    }
}

Operator make(const char *name, int cache, int32_t type) {
    Operator op = blank(name, cache, type);
    op.GetInputType = input_type;
    op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return INPUTS; };
    op.GetOutputType = [](const OrtCustomOp *o, size_t i) { return i == OUT ? FLOAT : ((const Operator *)o)->cache; };
    op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return OUTPUTS; };
    op.KernelDestroy = [](void *kernel) { delete (Kernel *)kernel; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t i) { return i >= POSITIONS ? OPTIONAL : REQUIRED; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = compute;
    return op;
}

// PageBounds: k [B,T,G*D], bounds [B,G,pages,2*stored], last_slot [B], k_scale; gives the bounds.
enum PageInput { PAGE_K, PAGE_BOUNDS, PAGE_LAST_SLOT, PAGE_K_SCALE, PAGE_INPUTS };

OrtStatus *compute_bounds(void *kernel, OrtKernelContext *context) {
    const Kernel &op = *(const Kernel *)kernel;
    Calls call{op.api};
    Tensor in[PAGE_INPUTS];
    for (size_t i = 0; i < PAGE_INPUTS; i++) in[i] = input(call, context, i);
    if (call.status) return call.status;
    const Tensor &past = in[PAGE_BOUNDS];
    int64_t B = in[PAGE_K].dims[0], T = in[PAGE_K].dims[1], D = in[PAGE_K].dims[2] / op.kv_heads;
    int64_t width = 2 * (op.cache_type == MC_I4 ? D / 2 : D), pages = past.dims[2];
    if (in[PAGE_K].rank != 3 || past.rank != 4 || past.dims[0] != B || past.dims[1] != op.kv_heads ||
        past.dims[3] != width || in[PAGE_LAST_SLOT].dims[0] != B || op.page_tokens < 1)
        return create_status(op.api, "memcompile.PageBounds: the sizes of its inputs do not fit together");
    Tensor out = output(call, context, 0, past);
    if (call.status) return call.status;
    size_t element = element_bytes(op.cache_type);
    // the runtime binds one buffer as both; without that the bounds are copied
    if (out.data != past.data) memcpy(out.data, past.data, (size_t)(B * op.kv_heads * pages * width) * element);
    std::vector<int32_t> used((size_t)B);
    for (int64_t b = 0; b < B; b++) {
        used[(size_t)b] = ((const int32_t *)in[PAGE_LAST_SLOT].data)[b] + 1;
        if (used[(size_t)b] > pages * op.page_tokens)
            return create_status(op.api, "memcompile.PageBounds: the bounds do not have a row for every page");
    }
    McPages a{};
    a.B = B, a.T = T, a.G = op.kv_heads, a.D = D;
    a.k = {in[PAGE_K].data, T * op.kv_heads * D, D, op.kv_heads * D};
    a.bounds = {out.data, op.kv_heads * pages * width, pages * width, width};
    a.type = MC_F32, a.cache_type = op.cache_type, a.page_tokens = op.page_tokens;
    a.used = used.data(), a.k_scale = (const float *)in[PAGE_K_SCALE].data;
    int32_t code = mc_page_bounds(&a);
    return code ? create_status(op.api, mc_reason(code)) : nullptr;
}

OrtStatus *create_bounds(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **made) {
    Kernel *k = new Kernel;
    k->api = api;
    k->cache_type = ((const Operator *)op)->type;
    drop(api, integer(api, info, "kv_num_heads", &k->kv_heads));
    drop(api, integer(api, info, "page_tokens", &k->page_tokens));
    if (k->kv_heads < 1) {
        delete k;
        return create_status(api, "memcompile.PageBounds: kv_num_heads is missing or wrong");
    }
    *made = k;
    return nullptr;
}

Operator make_bounds(const char *name, int cache, int32_t type) {
    Operator op = make(name, cache, type);
    op.GetInputType = [](const OrtCustomOp *o, size_t i) {
        return i == PAGE_BOUNDS ? ((const Operator *)o)->cache : i == PAGE_LAST_SLOT ? INT32 : FLOAT;
    };
    op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return PAGE_INPUTS; };
    op.GetOutputType = [](const OrtCustomOp *o, size_t) { return ((const Operator *)o)->cache; };
    op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return 1; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t i) { return i == PAGE_K_SCALE ? OPTIONAL : REQUIRED; };
    op.CreateKernelV2 = create_bounds;
    op.KernelComputeV2 = compute_bounds;
    return op;
}

const Operator OPERATORS[] = {
    make_bounds("PageBounds", FLOAT, MC_F32),
    make_bounds("PageBoundsBFloat16", BFLOAT16, MC_BF16),
    make_bounds("PageBoundsInt8", INT8, MC_I8),
    make_bounds("PageBoundsInt4", UINT8, MC_I4),
    make("Attention", FLOAT, MC_F32),
    make("AttentionBFloat16", BFLOAT16, MC_BF16),
    make("AttentionInt8", INT8, MC_I8),
    make("AttentionInt4", UINT8, MC_I4),
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                               const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(API_VERSION);
    if (!api) return nullptr;  // too old a runtime: the operators stay unknown, and loading says so
    // lives as long as the process: sessions may
    static OrtCustomOpDomain *domain = nullptr;
    if (!domain) {
        OrtStatus *failed = create_domain(api, "memcompile", &domain);
        if (failed) return failed;
        for (const Operator &op : OPERATORS)
            if ((failed = add_op(api, domain, &op))) return failed;
        for (const void *other : {quantized_linear_operator(), bfloat16_linear_operator(), sparse_ffn_operator()})
            if ((failed = add_op(api, domain, other))) return failed;
    }
    return add_domain(api, options, domain);
}
