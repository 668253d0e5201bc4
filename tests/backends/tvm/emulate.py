"""Run CUDA kernels that TVM generated on the CPU: each block with one system thread a CUDA thread.

Proves indexing, barriers and arithmetic of the source; says nothing of speed or of a GPU's memory model.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

HEADER = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>
using std::max; using std::min; using std::exp;
struct Index { int x = 0, y = 0, z = 0; };
static thread_local Index threadIdx;
static Index blockIdx;
static std::unique_ptr<std::barrier<>> block_barrier;
#define __global__
#define __launch_bounds__(n)
#define __shared__ static
#define __restrict__
static void __syncthreads() { block_barrier->arrive_and_wait(); }
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
template <class F> static void launch(int64_t blocks, int threads, F kernel) {
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = (int)block;
    block_barrier = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back([&, t] { threadIdx.x = t; kernel(); });
    for (auto& thread : running) thread.join();
  }
}
"""
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^;{)]*)\)\s*\{')


class Emulated:
    """The kernels of a CUDA source, compiled with g++ and called by name."""

    def __init__(self, source: str, folder: Path) -> None:
        # what comes before the first kernel is for NVIDIA's compilers
        body = source[source.index('extern "C"') :]
        body = re.sub(r"__shared__ alignas\((\d+)\) ", r"alignas(\1) __shared__ ", body)
        calls, self.parameters = [], {}
        for threads, name, parameters in KERNEL.findall(body):
            declared = [p.strip().replace("__restrict__ ", "") for p in parameters.split(",")]
            names = [p.split()[-1].lstrip("*") for p in declared]
            self.parameters[name] = [(n, "*" in p) for n, p in zip(names, declared, strict=True)]
            calls.append(
                f'extern "C" void run_{name}(int64_t blocks, {", ".join(declared)}) {{ '
                f"launch(blocks, {threads}, [&] {{ {name}({', '.join(names)}); }}); }}"
            )
        path = folder / "kernels.cpp"
        path.write_text(HEADER + body + "\n".join(calls), encoding="utf-8")
        library = folder / "kernels.so"
        command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o"]
        subprocess.run([*command, str(library), str(path)], check=True)
        self._library = ctypes.CDLL(str(library))

    def run(self, name: str, blocks: int, values: dict[str, int]) -> None:
        """Launch a kernel; `values` has addresses and sizes by parameter name."""
        given = [
            ctypes.c_void_p(values[n]) if pointer else ctypes.c_int64(values[n])
            for n, pointer in self.parameters[name]
        ]
        self._library[f"run_{name}"](ctypes.c_int64(blocks), *given)
