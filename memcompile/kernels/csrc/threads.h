// How many threads a host's work is cut for, where the host does not say.
#pragma once
#include <cstdint>
#include <thread>

// Asking the system takes longer than a small product: it is asked once.
inline int32_t processor_threads() {
    static const int32_t count = (int32_t)std::thread::hardware_concurrency();
    return count;
}
