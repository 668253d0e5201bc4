"""MetaSchedule in this process, and kernels timed by an RPC server in another one on loopback."""

from __future__ import annotations

import json
import socket
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from memcompile.backends.tvm.build import cpu_target
from memcompile.backends.tvm.rpc import measure_by_rpc
from memcompile.backends.tvm.search import scheduled, tune_prim_func
from memcompile.errors import MemcompileError

SIZE = 96


@T.prim_func(s_tir=True)
def matmul(a: T.handle, b: T.handle, c: T.handle):  # type: ignore[no-untyped-def]
    T.func_attr({"tirx.noalias": True})
    left = T.match_buffer(a, (SIZE, SIZE), "float32")
    right = T.match_buffer(b, (SIZE, SIZE), "float32")
    out = T.match_buffer(c, (SIZE, SIZE), "float32")
    for i, j, k in T.grid(SIZE, SIZE, SIZE):
        with T.sblock("out"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                out[vi, vj] = T.float32(0)
            out[vi, vj] = out[vi, vj] + left[vi, vk] * right[vk, vj]


@T.prim_func(s_tir=True)
def of_any_size(a: T.handle):  # type: ignore[no-untyped-def]
    n = T.int64()
    values = T.match_buffer(a, (n,), "float32")
    for i in range(n):
        with T.sblock("values"):
            vi = T.axis.spatial(n, i)
            values[vi] = values[vi] * T.float32(2)


def product(kernel: Any) -> np.ndarray:
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    run = tvm.compile(module, target=cpu_target())["main"]
    left = np.random.default_rng(1).standard_normal((SIZE, SIZE)).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros((SIZE, SIZE), np.float32))
    run(tvm.runtime.tensor(left), tvm.runtime.tensor(left), out)
    np.testing.assert_allclose(out.numpy(), left @ left, atol=1e-4)
    result: np.ndarray = out.numpy()
    return result


def test_a_search_finds_a_faster_schedule_that_computes_the_same() -> None:
    heard: list[str] = []
    found = tune_prim_func(matmul, trials=6, seconds=120, progress=heard.append)
    assert 0 < found.trials <= 6
    assert [line.split(":")[0] for line in heard] == [f"trial {i + 1} of 6" for i in range(found.trials)]
    # without a schedule it is a loop over single numbers: five times slower at the least
    assert found.seconds < found.default_seconds / 2
    stored = json.loads(json.dumps(found.trace))
    product(scheduled(matmul, stored))


def test_time_that_is_up_ends_a_search() -> None:
    with pytest.raises(MemcompileError, match="MC901 MetaSchedule found no candidate that could be timed"):
        tune_prim_func(matmul, trials=2, seconds=0, progress=lambda _: None)


def test_a_kernel_of_any_size_is_refused() -> None:
    with pytest.raises(MemcompileError, match="MC120 the kernel has sizes that are not fixed"):
        tune_prim_func(of_any_size, trials=1, seconds=1, progress=lambda _: None)


def test_a_kernel_is_timed_by_another_process(server: int) -> None:
    seconds = measure_by_rpc(matmul, cpu_target(), host="127.0.0.1", port=server)
    assert len(seconds) == 3
    # two times 96^3 operations: neither faster than any processor nor slower than a bad loop
    assert all(1e-7 < s < 1 for s in seconds)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MemcompileError, match=f"MC120 there is no TVM RPC server at 127.0.0.1:{port}"):
        measure_by_rpc(matmul, cpu_target(), host="127.0.0.1", port=port)
