// What the library exports: checks, the choice of an instruction set, and threads for hosts without any.
#include "attention.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#pragma GCC visibility push(default)
extern "C" void mc_use_gomp(void *parallel);
#pragma GCC visibility pop

#define MC_DECLARE(isa)                                  \
    namespace isa {                                      \
    int32_t attention(const McAttention &);              \
    int32_t append(const McAppend &);                    \
    }
MC_DECLARE(avx2)
MC_DECLARE(avx512)
MC_DECLARE(avx512bf16)

namespace {

struct Isa {
    const char *name;
    bool here;
    int32_t (*attention)(const McAttention &);
    int32_t (*append)(const McAppend &);
};

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// widest first
const Isa ISAS[] = {
    {"avx512bf16", has_bf16(), avx512bf16::attention, avx512bf16::append},
    {"avx512", has_avx512(), avx512::attention, avx512::append},
    {"avx2", has_avx2(), avx2::attention, avx2::append},
};

const Isa *widest() {
    for (const Isa &isa : ISAS)
        if (isa.here) return &isa;
    return nullptr;
}
const Isa *chosen = widest();

// Threads that wait for work; the caller is one of them.
class Pool {
  public:
    void run(McTask task, size_t count, void *data, int threads) {
        std::unique_lock<std::mutex> one(callers_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while ((int)workers_.size() < threads - 1) workers_.emplace_back([this] { work(); });
            task_ = task, data_ = data, count_ = count, next_ = 0, left_ = count, round_++;
        }
        wake_.notify_all();
        take();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return left_ == 0; });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
    }

  private:
    void take() {
        for (;;) {
            size_t i;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                if (next_ >= count_) return;
                i = next_++;
            }
            task_(data_, i);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--left_ == 0) done_.notify_one();
        }
    }
    void work() {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || round_ != seen; });
                if (stop_) return;
                seen = round_;
            }
            take();
        }
    }
    std::mutex callers_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    McTask task_ = nullptr;
    void *data_ = nullptr;
    size_t count_ = 0, next_ = 0, left_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

void run_in_pool(void *threads, McTask task, size_t count, void *data) {
    static Pool pool;
    pool.run(task, count, data, (int)(intptr_t)threads);
}

// GNU OpenMP's own threads, which torch keeps spinning: a second pool would fight them for the cores.
typedef void (*GompParallel)(void (*)(void *), void *, unsigned, unsigned);
GompParallel gomp = nullptr;

struct Shared {
    McTask task;
    void *data;
    size_t count, next;
};

void run_shared(void *p) {
    Shared *s = (Shared *)p;
    for (;;) {
        size_t i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (i >= s->count) return;
        s->task(s->data, i);
    }
}

void run_in_gomp(void *threads, McTask task, size_t count, void *data) {
    Shared shared = {task, data, count, 0};
    gomp(run_shared, &shared, (unsigned)(intptr_t)threads, 0);
}

enum Reason { DONE, NO_CPU, NO_MEMORY, UNSUPPORTED, SIZES };

}  // namespace

extern "C" {

const char *mc_reason(int32_t code) {
    switch (code) {
    case NO_CPU: return "this CPU has none of the instruction sets that were compiled";
    case NO_MEMORY: return "out of memory";
    case UNSUPPORTED: return "chosen slots are for decoding, at most 16 queries of a key/value head";
    case SIZES: return "sizes or types that no kernel takes";
    default: return "";
    }
}

const char *mc_isa() { return chosen ? chosen->name : ""; }

int32_t mc_use(const char *name) {
    for (const Isa &isa : ISAS)
        if (!strcmp(isa.name, name) && isa.here) {
            chosen = &isa;
            return DONE;
        }
    return NO_CPU;
}

// The address of GOMP_parallel in the OpenMP library that the process already has.
void mc_use_gomp(void *parallel) { gomp = (GompParallel)parallel; }

int32_t mc_attention(const McAttention *call) {
    if (!chosen) return NO_CPU;
    McAttention c = *call;
    if (c.B < 0 || c.T < 0 || c.S < 0 || c.G < 1 || c.H < c.G || c.H % c.G || c.D < 1 || c.D > 256) return SIZES;
    if (c.q_type < MC_F32 || c.q_type > MC_F16 || c.kv_type < MC_F32 || c.kv_type > MC_I4) return SIZES;
    if ((c.kv_type >= MC_I8) != (c.k_scale || c.k_token_scale) || !(c.scale > 0)) return SIZES;
    if (c.kv_type == MC_I4 && c.D % 2) return SIZES;
    if ((c.blocks || c.pattern) && c.block_tokens != 32 && c.block_tokens != 64 && c.block_tokens != 128) return SIZES;
    if (c.key_tile && c.key_tile != 16 && c.key_tile != 32 && c.key_tile != 64 && c.key_tile != 128) return SIZES;
    if (c.used)
        for (int64_t b = 0; b < c.B; b++)
            if (c.used[b] < 0 || c.used[b] > c.S) return SIZES;
    if (!c.B || !c.T) return DONE;
    if (c.threads < 1) c.threads = 1;
    if (!c.parallel) {
        c.parallel = gomp ? run_in_gomp : run_in_pool;
        c.host = (void *)(intptr_t)c.threads;
    }
    return chosen->attention(c);
}

int32_t mc_append(const McAppend *call) {
    if (!chosen) return NO_CPU;
    if (call->D < 1 || call->D > 256 || (call->cache_type == MC_I4 && call->D % 2)) return SIZES;
    return chosen->append(*call);
}
}
