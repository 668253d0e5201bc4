// One instruction set's linear layers. Compiled once a set, with MC_ISA its name.
#include "linear.h"
#include "linear_few.h"
#include "linear_many.h"
#include "tasks.h"

namespace MC_ISA {

// Rows of x up to which each row of the weight is read where it lies, and not unpacked into a panel.
constexpr int64_t FEW_INPUTS = 8;

// Held from call to call by the thread that makes them.
static thread_local Scratch prepared;

int32_t linear(const McLinear &l) {
    bool few = l.M <= FEW_INPUTS, coded = l.weight_type >= MC_I8;
    Inputs in = {};
    in.l = &l;
    in.chunk = chunk_of(l.weight_type);
    in.blocks = coded ? (l.K + l.block - 1) / l.block : 0;
    in.steps = round_up(coded ? in.blocks * l.block : l.K, in.chunk);
    size_t cells = (size_t)(l.M * in.steps), blocks = (size_t)(l.M * in.blocks);
    bool rounded = coded && l.activations == MC_I8, paired = false;
#if defined(__AVX512BF16__)
    paired = !few && l.activations == MC_BF16;
#endif
    if (!prepared.reserve(cells * 4 + blocks * 8 + 4096)) return 2;
    if (rounded || (few && (l.offsets || l.zero_points))) in.sums = prepared.take<float>(blocks);
    if (rounded) {
        in.codes = prepared.take<int8_t>(cells);
        in.scales = prepared.take<float>(blocks);
        if (few) in.middles = prepared.take<int32_t>(cells / (size_t)in.chunk * LANES);
    } else if (paired)
        in.pairs = prepared.take<uint32_t>(cells / 2);
    else
        in.floats = prepared.take<float>(cells);
    // one row is arranged sooner than a thread wakes
    if (few)
        for (int64_t m = 0; m < l.M; m++) arrange_task(&in, (size_t)m);
    else
        run(l, arrange_task, (size_t)l.M, &in);
    if (in.no_memory) return 2;
    if (few) {
        Few f = {&in, 0};
        // parts enough to keep the threads level, whole vectors of results
        int64_t most = round_up(l.N / (l.threads * 4) + 1, LANES);
        f.rows_together = most < LANES ? LANES : most > 1024 ? 1024 : most;
        run(l, few_task, (size_t)((l.N + f.rows_together - 1) / f.rows_together), &f);
        return 0;
    }
    int64_t panels = (l.N + PANEL - 1) / PANEL, wanted = (l.threads * 4 + panels - 1) / panels;
    Many p = {&in, round_up((l.M + wanted - 1) / wanted, 6), 0};
    if (p.together > MOST_TOGETHER) p.together = MOST_TOGETHER;
    p.row_tasks = (l.M + p.together - 1) / p.together;
    run(l, many_task, (size_t)(panels * p.row_tasks), &p);
    return in.no_memory ? 2 : 0;
}

}  // namespace MC_ISA
