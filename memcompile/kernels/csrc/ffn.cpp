// One instruction set's sparse feed-forward layers. Compiled once a set, with MC_ISA its name.
#include "ffn.h"
#include "largest.h"
#include "scratch.h"
#include "tasks.h"
#include "vector.h"

#include <cmath>
#include <cstdlib>

namespace MC_ISA {

constexpr int AT_ONCE = 4;  // neurons whose rows are read together

struct Ffn {
    const McFfn *f;
    const float *x;        // the row's input
    float *active;         // [F] act(gate . x), of all neurons or of those that are chosen
    const int32_t *chosen; // null: all neurons
    int64_t count, together;
    float *partial;        // [tasks,M]
    bool gated;            // `active` is known already
};

// rows i .. i+n-1 of `chosen` (or of all) times x
template <int N>
static inline void dots(const float *weight, const int64_t *rows, const float *x, int64_t M, float *y) {
    Vf acc[N];
    for (int j = 0; j < N; j++) acc[j] = Vf{};
    int64_t m = 0;
    for (; m + LANES <= M; m += LANES) {
        Vf v = load(x + m);
        for (int j = 0; j < N; j++) acc[j] += load(weight + rows[j] * M + m) * v;
    }
    for (int j = 0; j < N; j++) {
        float sum = sum_of(acc[j]);
        for (int64_t i = m; i < M; i++) sum += weight[rows[j] * M + i] * x[i];
        y[j] = sum;
    }
}

static void activate(int32_t kind, float *x, int64_t n) {
    int64_t i = 0;
    if (kind == MC_SILU || kind == MC_GELU_TANH)
        for (; i + LANES <= n; i += LANES) {
            Vf v = load(x + i);
            // silu(v) = v / (1 + exp(-v)); gelu_tanh(v) = v / (1 + exp(-2 t))
            Vf t = kind == MC_SILU ? v : (v + v * v * v * 0.044715f) * 1.5957691216f;
            Vf e = t * -1.4426950408889634f;
            e = e > 125.0f ? all(125.0f) : e;
            store(x + i, v / (1.0f + exp2v(e)));
        }
    for (; i < n; i++) {
        float v = x[i];
        if (kind == MC_RELU) x[i] = v > 0 ? v : 0;
        else if (kind == MC_GELU) x[i] = 0.5f * v * (1 + erff(v * 0.70710678f));
        else {
            float t = kind == MC_SILU ? v : (v + v * v * v * 0.044715f) * 1.5957691216f;
            x[i] = v / (1 + expf(-t));
        }
    }
}

static void gate_task(void *data, size_t index) {
    const Ffn &p = *(const Ffn *)data;
    int64_t from = (int64_t)index * p.together, to = from + p.together, i = from;
    to = to < p.count ? to : p.count;
    for (; i + AT_ONCE <= to; i += AT_ONCE) {
        int64_t rows[AT_ONCE];
        for (int j = 0; j < AT_ONCE; j++) rows[j] = p.chosen ? p.chosen[i + j] : i + j;
        dots<AT_ONCE>(p.f->gate, rows, p.x, p.f->M, p.active + i);
    }
    for (; i < to; i++) {
        int64_t row = p.chosen ? p.chosen[i] : i;
        dots<1>(p.f->gate, &row, p.x, p.f->M, p.active + i);
    }
    if (to > from) activate(p.f->activation, p.active + from, to - from);
}

static void sum_task(void *data, size_t index) {
    const Ffn &p = *(const Ffn *)data;
    const McFfn &f = *p.f;
    if (!p.gated) gate_task(data, index);
    int64_t from = (int64_t)index * p.together, to = from + p.together, M = f.M;
    to = to < p.count ? to : p.count;
    float *out = p.partial + (int64_t)index * M;
    for (int64_t m = 0; m < M; m++) out[m] = 0;
    for (int64_t i = from; i < to; i += AT_ONCE) {
        int n = (int)(to - i < AT_ONCE ? to - i : AT_ONCE);
        int64_t rows[AT_ONCE];
        float by[AT_ONCE];
        for (int j = 0; j < AT_ONCE; j++) {
            int64_t at = i + (j < n ? j : 0);
            rows[j] = p.chosen ? p.chosen[at] : at;
        }
        dots<AT_ONCE>(f.up, rows, p.x, M, by);
        for (int j = 0; j < AT_ONCE; j++) {
            // where every neuron's gate was computed, they are found by their number
            by[j] = j < n ? by[j] * p.active[p.gated ? rows[j] : i + j] : 0;
        }
        int64_t m = 0;
        for (; m + LANES <= M; m += LANES) {
            Vf y = load(out + m);
            for (int j = 0; j < AT_ONCE; j++) y += load(f.down + rows[j] * M + m) * by[j];
            store(out + m, y);
        }
        for (; m < M; m++)
            for (int j = 0; j < AT_ONCE; j++) out[m] += f.down[rows[j] * M + m] * by[j];
    }
}

static int64_t level(const McFfn &f, int64_t count) {
    int64_t parts = f.threads <= 1 ? 1 : f.threads * 2, together = (count + parts - 1) / parts;
    return (together + LANES - 1) / LANES * LANES;
}

int32_t ffn(const McFfn &f) {
    int64_t tasks = f.threads * 2 + 1;
    void *memory = nullptr;
    size_t bytes = (size_t)(4 * f.F + tasks * f.M) * 4 + (size_t)f.F + 256;
    if (posix_memalign(&memory, 64, bytes)) return 2;
    float *active = (float *)memory, *work = active + f.F, *size = work + f.F, *partial = size + f.F;
    int32_t *chosen = (int32_t *)(partial + tasks * f.M);
    uint8_t *mark = (uint8_t *)(chosen + f.F);
    for (int64_t b = 0; b < f.B; b++) {
        Ffn p = {&f, f.x + b * f.M, active, nullptr, f.F, level(f, f.F), partial, false};
        const float *score = f.counts ? f.counts + b * f.F : active;
        bool some = !f.counts;
        for (int64_t i = 0; i < f.F && !some; i++) some = score[i] > 0;
        if (some && f.keep < f.F) {
            if (!f.counts) {
                run(f, gate_task, (size_t)((p.count + p.together - 1) / p.together), &p);
                p.gated = true;
            }
            for (int64_t i = 0; i < f.F; i++) size[i] = fabsf(score[i]), mark[i] = 0;
            mark_largest(size, f.F, f.keep, mark, work);
            p.count = 0;
            for (int64_t i = 0; i < f.F; i++)
                if (mark[i]) chosen[p.count++] = (int32_t)i;
            p.chosen = chosen, p.together = level(f, p.count);
        }
        int64_t parts = (p.count + p.together - 1) / p.together;
        run(f, sum_task, (size_t)parts, &p);
        for (int64_t m = 0; m < f.M; m++) {
            float sum = 0;
            for (int64_t i = 0; i < parts; i++) sum += partial[i * f.M + m];
            f.out[b * f.M + m] = sum;
        }
    }
    free(memory);
    return 0;
}

}  // namespace MC_ISA
