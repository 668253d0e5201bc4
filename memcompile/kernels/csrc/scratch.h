// Memory of one thread that outlives the call: grows, never shrinks, goes with the thread.
#pragma once
#include <cstddef>
#include <cstdlib>

namespace MC_ISA {

struct Scratch {
    char *base = nullptr;
    size_t size = 0, taken = 0;
    ~Scratch() { free(base); }
    // Start a new task that needs at most `bytes`; false: no memory.
    bool reserve(size_t bytes) {
        taken = 0;
        if (bytes <= size) return true;
        free(base);
        base = nullptr;
        size = 0;
        void *p = nullptr;
        if (posix_memalign(&p, 64, bytes)) return false;
        base = (char *)p;
        size = bytes;
        return true;
    }
    template <class X> X *take(size_t count) {
        X *p = (X *)(base + taken);
        taken += (count * sizeof(X) + 63) / 64 * 64;
        return p;
    }
};

static thread_local Scratch scratch;

}  // namespace MC_ISA
