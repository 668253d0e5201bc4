// What every call shares: element types, the host's threads, and the library's own questions.
#pragma once
#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

enum McType : int32_t { MC_F32 = 0, MC_BF16 = 1, MC_F16 = 2, MC_I8 = 3, MC_I4 = 4, MC_I3 = 5 };

typedef void (*McTask)(void *data, size_t index);
// Runs task(data, 0 .. count-1), in any order, on the host's threads; returns when all are done.
typedef void (*McParallel)(void *host, McTask task, size_t count, void *data);

const char *mc_reason(int32_t code);
// Name of the widest instruction set that was compiled and that this CPU has; `mc_use` chooses another.
const char *mc_isa();
int32_t mc_use(const char *isa);
}
#pragma GCC visibility pop
