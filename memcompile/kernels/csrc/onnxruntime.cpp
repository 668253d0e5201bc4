// The kernels as custom operators of ONNX Runtime, domain "memcompile": Attention (float32 cache),
// AttentionInt8 and AttentionInt4 (codes). The runtime's stable C interface is declared here, as far as it
// is used: a table of function pointers whose order never changes, and OrtCustomOp of version 16.
#include "attention.h"

#include <cstring>
#include <thread>
#include <vector>

namespace {

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;

struct OrtApi {
    void *functions[400];
};
struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)();
};
constexpr uint32_t API_VERSION = 17;  // the first with ParallelFor

template <int INDEX, class R, class... A> R ort(const OrtApi *api, A... arguments) {
    return ((R(*)(A...))api->functions[INDEX])(arguments...);
}
OrtStatus *create_status(const OrtApi *api, const char *message) {
    return ort<0, OrtStatus *, int, const char *>(api, 1, message);
}
OrtStatus *create_domain(const OrtApi *api, const char *name, OrtCustomOpDomain **domain) {
    return ort<26, OrtStatus *>(api, name, domain);
}
OrtStatus *add_op(const OrtApi *api, OrtCustomOpDomain *domain, const void *op) {
    return ort<27, OrtStatus *>(api, domain, op);
}
OrtStatus *add_domain(const OrtApi *api, OrtSessionOptions *options, OrtCustomOpDomain *domain) {
    return ort<28, OrtStatus *>(api, options, domain);
}
void drop(const OrtApi *api, OrtStatus *status) {
    if (status) ort<93, void>(api, status);
}

struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
};

// element types of ONNX
constexpr int FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7;
constexpr int REQUIRED = 0, OPTIONAL = 1;

enum Input { Q, K, V, PAST_K, PAST_V, LAST_SLOT, SLOTS, POSITIONS, K_SCALE, V_SCALE, PATTERN, INPUTS };
enum Output { OUT, PRESENT_K, PRESENT_V, OUTPUTS };

struct Operator : OrtCustomOp {
    const char *name;
    int cache;        // its element type in ONNX
    int32_t type;     // and as the kernels call it
};

struct Kernel {
    const OrtApi *api;
    int32_t cache_type;
    int64_t heads = 0, kv_heads = 0, causal = 1, window = 0, sinks = 0, block = 0, stride = 0;
    int64_t block_tokens = 0, pattern_from = 0, splits = 0, key_tile = 0;
    float scale = 0, softcap = 0;
};

struct Tensor {
    void *data = nullptr;
    int64_t dims[4] = {1, 1, 1, 1};
    size_t rank = 0;
};

// The first failure of a run of calls; later calls do nothing.
struct Calls {
    const OrtApi *api;
    OrtStatus *status = nullptr;
    template <int INDEX, class... A> bool operator()(std::integral_constant<int, INDEX>, A... a) {
        if (!status) status = ort<INDEX, OrtStatus *>(api, a...);
        return !status;
    }
};
template <int INDEX> constexpr std::integral_constant<int, INDEX> api_function{};

Tensor describe(Calls &call, const OrtValue *value) {
    Tensor t;
    OrtTensorTypeAndShapeInfo *info = nullptr;
    call(api_function<51>, (OrtValue *)value, &t.data);
    if (!call(api_function<65>, value, &info)) return t;
    if (call(api_function<61>, (const OrtTensorTypeAndShapeInfo *)info, &t.rank) && t.rank <= 4)
        call(api_function<62>, (const OrtTensorTypeAndShapeInfo *)info, (int64_t *)t.dims, t.rank);
    ort<99, void>(call.api, info);
    return t;
}

Tensor input(Calls &call, OrtKernelContext *context, size_t index) {
    const OrtValue *value = nullptr;
    if (!call(api_function<90>, (const OrtKernelContext *)context, index, &value) || !value) return {};
    return describe(call, value);
}

Tensor output(Calls &call, OrtKernelContext *context, size_t index, const Tensor &like) {
    OrtValue *value = nullptr;
    if (!call(api_function<91>, context, index, (const int64_t *)like.dims, like.rank, &value)) return {};
    return describe(call, value);
}

struct Host {
    const OrtApi *api;
    OrtKernelContext *context;
};

void run_on_host(void *host, McTask task, size_t count, void *data) {
    Host *h = (Host *)host;
    OrtStatus *failed = ort<274, OrtStatus *>(h->api, (const OrtKernelContext *)h->context, task, count, (size_t)0, data);
    if (!failed) return;
    drop(h->api, failed);
    for (size_t i = 0; i < count; i++) task(data, i);
}

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
    size_t element = op.cache_type == MC_F32 ? 4 : 1;
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
    c.parallel = run_on_host, c.host = &host;
    c.threads = (int32_t)std::thread::hardware_concurrency();
    c.splits = (int32_t)op.splits, c.key_tile = (int32_t)op.key_tile;
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
                {"block_tokens", &k->block_tokens}, {"pattern_from", &k->pattern_from}, {"splits", &k->splits}, {"key_tile", &k->key_tile}};
    // an attribute that is not there keeps its default
    for (auto &attribute : ints) drop(api, ort<86, OrtStatus *>(api, info, attribute.name, attribute.value));
    drop(api, ort<85, OrtStatus *>(api, info, "scale", &k->scale));
    drop(api, ort<85, OrtStatus *>(api, info, "softcap", &k->softcap));
    if (k->heads < 1 || k->kv_heads < 1 || k->heads % k->kv_heads || !(k->scale > 0)) {
        delete k;
        return create_status(api, "memcompile.Attention: num_heads, kv_num_heads or scale is missing or wrong");
    }
    *made = k;
    return nullptr;
}

int input_type(const OrtCustomOp *op, size_t index) {
    switch (index) {
    case PAST_K: case PAST_V: return ((const Operator *)op)->cache;
    case LAST_SLOT: case SLOTS: case PATTERN: return INT32;
    case POSITIONS: return INT64;
    default: return FLOAT;
    }
}

Operator make(const char *name, int cache, int32_t type) {
    Operator op{};
    op.version = 16;
    op.GetName = [](const OrtCustomOp *o) { return ((const Operator *)o)->name; };
    op.GetExecutionProviderType = [](const OrtCustomOp *) -> const char * { return "CPUExecutionProvider"; };
    op.GetInputType = input_type;
    op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return INPUTS; };
    op.GetOutputType = [](const OrtCustomOp *o, size_t i) { return i == OUT ? FLOAT : ((const Operator *)o)->cache; };
    op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return OUTPUTS; };
    op.KernelDestroy = [](void *kernel) { delete (Kernel *)kernel; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t i) { return i >= POSITIONS ? OPTIONAL : REQUIRED; };
    op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return 0; };
    op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp *) { return 1; };
    op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp *) { return 1; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = compute;
    op.name = name, op.cache = cache, op.type = type;
    return op;
}

const Operator OPERATORS[] = {
    make("Attention", FLOAT, MC_F32),
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
    }
    return add_domain(api, options, domain);
}
