// What the library exports: checks, the choice of an instruction set, and threads for hosts without any.
#include "attention.h"
#include "ffn.h"
#include "linear.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(MC_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#pragma GCC visibility push(default)
extern "C" void mc_use_gomp(void *parallel);
#pragma GCC visibility pop

#define MC_DECLARE(isa)                                  \
    namespace isa {                                      \
    int32_t attention(const McAttention &);              \
    int32_t append(const McAppend &);                    \
    int32_t page_bounds(const McPages &);                \
    int32_t linear(const McLinear &);                    \
    int32_t ffn(const McFfn &);                          \
    }
MC_DECLARE(avx2)
MC_DECLARE(avx512)
MC_DECLARE(avx512bf16)
#if defined(MC_WITH_AMX)
MC_DECLARE(amx)
#endif

namespace {

struct Isa {
    const char *name;
    bool here;
    int32_t (*attention)(const McAttention &);
    int32_t (*append)(const McAppend &);
    int32_t (*page_bounds)(const McPages &);
    int32_t (*linear)(const McLinear &);
    int32_t (*ffn)(const McFfn &);
};

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#if defined(MC_WITH_AMX)
// The tiles' registers are large: Linux gives them to a process that asks (arch_prctl, ARCH_REQ_XCOMP_PERM).
bool has_amx() {
    unsigned a, b, c, d, low, high;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, STATES = 3u << 17;
    if (!has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & STATES) == STATES && !syscall(SYS_arch_prctl, 0x1023, 18);
}
#endif

// widest first
const Isa ISAS[] = {
#if defined(MC_WITH_AMX)
    {"amx", has_amx(), amx::attention, amx::append, amx::page_bounds, amx::linear, amx::ffn},
#endif
    {"avx512bf16", has_bf16(), avx512bf16::attention, avx512bf16::append, avx512bf16::page_bounds, avx512bf16::linear, avx512bf16::ffn},
    {"avx512", has_avx512(), avx512::attention, avx512::append, avx512::page_bounds, avx512::linear, avx512::ffn},
    {"avx2", has_avx2(), avx2::attention, avx2::append, avx2::page_bounds, avx2::linear, avx2::ffn},
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

// A host without threads of its own gets the library's.
template <class Call> void use_threads(Call &call) {
    if (call.threads < 1) call.threads = 1;
    if (call.parallel) return;
    call.parallel = gomp ? run_in_gomp : run_in_pool;
    call.host = (void *)(intptr_t)call.threads;
}

bool is_page(int64_t tokens) { return tokens == 16 || tokens == 32 || tokens == 64; }

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
    if (c.bounds.data && (!is_page(c.page_tokens) || c.page_keep < 1 || c.k_token_scale)) return SIZES;
    if (c.used)
        for (int64_t b = 0; b < c.B; b++)
            if (c.used[b] < 0 || c.used[b] > c.S) return SIZES;
    if (!c.B || !c.T) return DONE;
    use_threads(c);
    return chosen->attention(c);
}

int32_t mc_append(const McAppend *call) {
    if (!chosen) return NO_CPU;
    if (call->D < 1 || call->D > 256 || (call->cache_type == MC_I4 && call->D % 2)) return SIZES;
    return chosen->append(*call);
}

int32_t mc_page_bounds(const McPages *call) {
    if (!chosen) return NO_CPU;
    const McPages &a = *call;
    if (a.D < 1 || a.D > 256 || !is_page(a.page_tokens) || (a.cache_type == MC_I4 && a.D % 2)) return SIZES;
    if ((a.cache_type >= MC_I8) != (a.k_scale != nullptr)) return SIZES;
    return chosen->page_bounds(a);
}

int32_t mc_linear(const McLinear *call) {
    if (!chosen) return NO_CPU;
    McLinear l = *call;
    if (l.M < 0 || l.N < 0 || l.K < 1) return SIZES;
    bool coded = l.weight_type == MC_I8 || l.weight_type == MC_I4 || l.weight_type == MC_I3;
    if (!coded && l.weight_type != MC_F32 && l.weight_type != MC_BF16) return SIZES;
    if (coded && (!l.scales || (l.block != 32 && l.block != 64 && l.block != 128 && l.block != 256))) return SIZES;
    if (l.activations != MC_F32 && l.activations != MC_BF16 && (l.activations != MC_I8 || !coded)) return SIZES;
    if (l.weight_type == MC_I3 && !l.table) return SIZES;
    if (l.table && (!coded || l.weight_type == MC_I8 || l.zero_points || l.offsets || l.activations == MC_I8)) return SIZES;
    if (!l.M || !l.N) return DONE;
    use_threads(l);
    return chosen->linear(l);
}

int32_t mc_ffn(const McFfn *call) {
    if (!chosen) return NO_CPU;
    McFfn f = *call;
    if (f.B < 0 || f.M < 1 || f.F < 1 || f.keep < 1 || f.activation < MC_SILU || f.activation > MC_RELU) return SIZES;
    if (!f.B) return DONE;
    use_threads(f);
    return chosen->ffn(f);
}
}
