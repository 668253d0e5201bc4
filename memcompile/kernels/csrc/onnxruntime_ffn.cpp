// The sparse feed-forward kernel as a custom operator of ONNX Runtime, domain "memcompile": SparseFfn.
#include "ffn.h"
#include "onnxruntime.h"

namespace {

enum Input { X, GATE, UP, DOWN, COUNTS, INPUTS };

struct Kernel {
    const OrtApi *api;
    int64_t keep = 0, activation = 0;
};

OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const Kernel &op = *(const Kernel *)kernel;
    Calls call{op.api};
    Tensor in[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) in[i] = input(call, context, i);
    if (call.status) return call.status;
    int64_t M = in[GATE].dims[1], F = in[GATE].dims[0], B = 1;
    for (size_t i = 0; i + 1 < in[X].rank; i++) B *= in[X].dims[i];
    bool fits = in[X].rank > 0 && in[X].dims[in[X].rank - 1] == M;
    for (int i = UP; i <= DOWN; i++) fits &= in[i].dims[0] == F && in[i].dims[1] == M;
    if (in[COUNTS].data) fits &= in[COUNTS].dims[0] == B && in[COUNTS].dims[in[COUNTS].rank - 1] == F;
    if (!fits) return create_status(op.api, "memcompile.SparseFfn: the sizes of its inputs do not fit together");
    Tensor out = output(call, context, 0, in[X]);
    if (call.status) return call.status;
    Host host{op.api, context};
    McFfn f{};
    f.B = B, f.M = M, f.F = F, f.keep = op.keep, f.activation = (int32_t)op.activation;
    f.x = (const float *)in[X].data, f.gate = (const float *)in[GATE].data, f.up = (const float *)in[UP].data;
    f.down = (const float *)in[DOWN].data, f.counts = (const float *)in[COUNTS].data, f.out = (float *)out.data;
    f.parallel = run_on_host, f.host = &host;
    f.threads = processor_threads();
    int32_t code = mc_ffn(&f);
    return code ? create_status(op.api, mc_reason(code)) : nullptr;
}

OrtStatus *create_kernel(const OrtCustomOp *, const OrtApi *api, const OrtKernelInfo *info, void **made) {
    Kernel k{api};
    drop(api, integer(api, info, "keep", &k.keep));
    drop(api, integer(api, info, "activation", &k.activation));
    if (k.keep < 1) return create_status(api, "memcompile.SparseFfn: keep is missing or wrong");
    *made = new Kernel(k);
    return nullptr;
}

Operator make() {
    Operator op = blank("SparseFfn");
    op.GetInputType = [](const OrtCustomOp *, size_t) { return FLOAT; };
    op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return INPUTS; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t i) { return i == COUNTS ? OPTIONAL : REQUIRED; };
    op.KernelDestroy = [](void *kernel) { delete (Kernel *)kernel; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = compute;
    return op;
}

}  // namespace

const void *sparse_ffn_operator() {
    static const Operator op = make();
    return &op;
}
