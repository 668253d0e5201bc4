// The runtime's stable C interface, declared as far as it is used: a table of function pointers whose order
// never changes, and OrtCustomOp of version 16.
#pragma once
#include "host.h"
#include "threads.h"

#include <type_traits>

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
constexpr int FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BFLOAT16 = 16;
constexpr int REQUIRED = 0, OPTIONAL = 1;

struct Operator : OrtCustomOp {
    const char *name;
    int cache;        // its element type in ONNX
    int32_t type;     // and as the kernels call it
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

// What operators have in common: those with one output of floats need no more of outputs.
inline Operator blank(const char *name, int cache = FLOAT, int32_t type = MC_F32) {
    Operator op{};
    op.version = 16;
    op.GetName = [](const OrtCustomOp *o) { return ((const Operator *)o)->name; };
    op.GetExecutionProviderType = [](const OrtCustomOp *) -> const char * { return "CPUExecutionProvider"; };
    op.GetOutputType = [](const OrtCustomOp *, size_t) { return FLOAT; };
    op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return 1; };
    op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return 0; };
    op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp *) { return 1; };
    op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp *) { return 1; };
    op.name = name, op.cache = cache, op.type = type;
    return op;
}

inline OrtStatus *integer(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *value) {
    return ort<86, OrtStatus *>(api, info, name, value);
}
inline OrtStatus *real(const OrtApi *api, const OrtKernelInfo *info, const char *name, float *value) {
    return ort<85, OrtStatus *>(api, info, name, value);
}

}  // namespace
