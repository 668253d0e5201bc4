// A call's tasks on its host's threads, or here where one thread is all there is.
#pragma once
#include "host.h"

namespace MC_ISA {

template <class Call> static void run(const Call &call, McTask task, size_t count, void *data) {
    if (call.threads <= 1 || count <= 1) {
        for (size_t i = 0; i < count; i++) task(data, i);
        return;
    }
    call.parallel(call.host, task, count, data);
}

}  // namespace MC_ISA
