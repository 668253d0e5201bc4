"""A linear layer of fixed sizes as blocks, the form that MetaSchedule searches schedules for."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def product_blocks(rows: int, width: int, features: int) -> Any:
    """`out = x @ weight.T` in float32: x [rows,width], weight [features,width], out [rows,features]."""

    @T.prim_func(s_tir=True)
    def product(x_handle: T.handle, weight_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_handle, (rows, width), "float32")
        weight = T.match_buffer(weight_handle, (features, width), "float32")
        out = T.match_buffer(out_handle, (rows, features), "float32")
        for i, j, k in T.grid(rows, features, width):
            with T.sblock("out"):
                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                with T.init():
                    out[vi, vj] = T.float32(0)
                out[vi, vj] = out[vi, vj] + x[vi, vk] * weight[vj, vk]

    return product
