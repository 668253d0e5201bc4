// The linear kernels as custom operators of ONNX Runtime, domain "memcompile": QuantizedLinear over codes, and
// LinearBFloat16 over stored bfloat16.
#include "linear.h"
#include "onnxruntime.h"

namespace {

enum Input { X, CODES, SCALES, ZERO_POINTS, OFFSETS, TABLE, BIAS, INPUTS };

struct Kernel {
    const OrtApi *api;
    int64_t K = 0, N = 0, bits = 4, block = 0, activations = MC_F32;
};

// Run `l` on x [...,K], the rest of which is filled in: its rows, the output [...,N], the host's threads.
OrtStatus *multiply(Calls &call, OrtKernelContext *context, const Tensor &x, McLinear l) {
    Tensor like = x;
    like.dims[like.rank - 1] = l.N;
    l.M = 1;
    for (size_t i = 0; i + 1 < like.rank; i++) l.M *= like.dims[i];
    Tensor out = output(call, context, 0, like);
    if (call.status) return call.status;
    Host host{call.api, context};
    l.x = (const float *)x.data, l.out = (float *)out.data;
    l.parallel = run_on_host, l.host = &host;
    l.threads = processor_threads();
    int32_t code = mc_linear(&l);
    return code ? create_status(call.api, mc_reason(code)) : nullptr;
}

OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const Kernel &op = *(const Kernel *)kernel;
    Calls call{op.api};
    Tensor in[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) in[i] = input(call, context, i);
    if (call.status) return call.status;
    int64_t blocks = (op.K + op.block - 1) / op.block;
    if (in[X].rank < 1 || in[X].dims[in[X].rank - 1] != op.K || in[CODES].dims[0] != op.N ||
        in[CODES].dims[1] * in[CODES].dims[2] != blocks * op.block * op.bits / 8 ||
        in[SCALES].dims[0] * in[SCALES].dims[1] != op.N * blocks || (in[TABLE].data && in[TABLE].dims[0] != 1 << op.bits))
        return create_status(op.api, "memcompile.QuantizedLinear: the sizes of its inputs do not fit together");
    McLinear l{};
    l.N = op.N, l.K = op.K, l.weight = in[CODES].data;
    l.weight_type = op.bits == 4 ? MC_I4 : op.bits == 3 ? MC_I3 : MC_I8, l.block = (int32_t)op.block;
    l.scales = (const float *)in[SCALES].data, l.zero_points = (const uint8_t *)in[ZERO_POINTS].data;
    l.offsets = (const float *)in[OFFSETS].data, l.table = (const float *)in[TABLE].data;
    l.bias = (const float *)in[BIAS].data;
    l.activations = (int32_t)op.activations;
    return multiply(call, context, in[X], l);
}

OrtStatus *create_kernel(const OrtCustomOp *, const OrtApi *api, const OrtKernelInfo *info, void **made) {
    Kernel k{api};
    struct {
        const char *name;
        int64_t *value;
    } ints[] = {{"K", &k.K}, {"N", &k.N}, {"bits", &k.bits}, {"block_size", &k.block}, {"activations", &k.activations}};
    // an attribute that is not there keeps its default
    for (auto &attribute : ints) drop(api, integer(api, info, attribute.name, attribute.value));
    if (k.K < 1 || k.N < 1 || k.block < 1 || (k.bits != 3 && k.bits != 4 && k.bits != 8))
        return create_status(api, "memcompile.QuantizedLinear: K, N, bits or block_size is missing or wrong");
    *made = new Kernel(k);
    return nullptr;
}

Operator make() {
    Operator op = blank("QuantizedLinear");
    op.GetInputType = [](const OrtCustomOp *, size_t i) { return i == CODES || i == ZERO_POINTS ? UINT8 : FLOAT; };
    op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return INPUTS; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t i) { return i >= ZERO_POINTS ? OPTIONAL : REQUIRED; };
    op.KernelDestroy = [](void *kernel) { delete (Kernel *)kernel; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = compute;
    return op;
}

// LinearBFloat16: x [...,K] and weight [N,K]. Many rows of x are rounded to bfloat16 as well.
enum PlainInput { PLAIN_X, PLAIN_WEIGHT, PLAIN_INPUTS };

OrtStatus *compute_plain(void *kernel, OrtKernelContext *context) {
    const OrtApi *api = ((const Kernel *)kernel)->api;
    Calls call{api};
    Tensor in[PLAIN_INPUTS];
    for (size_t i = 0; i < PLAIN_INPUTS; i++) in[i] = input(call, context, i);
    if (call.status) return call.status;
    McLinear l{};
    l.N = in[PLAIN_WEIGHT].dims[0], l.K = in[PLAIN_WEIGHT].dims[1];
    if (in[PLAIN_WEIGHT].rank != 2 || in[PLAIN_X].rank < 1 || in[PLAIN_X].dims[in[PLAIN_X].rank - 1] != l.K)
        return create_status(api, "memcompile.LinearBFloat16: the sizes of its inputs do not fit together");
    l.weight = in[PLAIN_WEIGHT].data, l.weight_type = l.activations = MC_BF16;
    return multiply(call, context, in[PLAIN_X], l);
}

Operator make_plain() {
    Operator op = make();
    op.name = "LinearBFloat16";
    op.GetInputType = [](const OrtCustomOp *, size_t i) { return i == PLAIN_WEIGHT ? BFLOAT16 : FLOAT; };
    op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return PLAIN_INPUTS; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t) { return REQUIRED; };
    op.CreateKernelV2 = [](const OrtCustomOp *, const OrtApi *api, const OrtKernelInfo *, void **made) -> OrtStatus * {
        *made = new Kernel{api};
        return nullptr;
    };
    op.KernelComputeV2 = compute_plain;
    return op;
}

}  // namespace

const void *quantized_linear_operator() {
    static const Operator op = make();
    return &op;
}

const void *bfloat16_linear_operator() {
    static const Operator op = make_plain();
    return &op;
}
