"""Matrix product with a weight as models store it, [F,M]: many rows in a prompt, one row in decoding."""

from __future__ import annotations

import functools
from typing import Any, Final

from tvm.script import tirx as T

from memcompile.backends.tvm.kernels.arithmetic import LANES, OPAQUE

# the register tile
ROWS: Final = 4
FEATURES: Final = 4


@functools.cache
def linear_kernel(width: int, features: int, *, rows: int = ROWS, columns: int = FEATURES) -> Any:
    """`out = x @ weight.T` in float32: x [N,width], weight [features,width], out [N,features]; any N.

    A tile is `rows` x `columns` features, each sum in one vector over the width: the weight needs no packing.
    Threads share the features; a tile of the weight is read from memory once for all rows.
    """
    full, rest = divmod(width, LANES)
    has_rest = rest > 0
    tiles = -(-features // columns)

    @T.inline
    def tile(x, weight, out, sums, count, row, feature):
        for r in T.unroll(T.int64(count)):
            for f in T.unroll(T.int64(columns)):
                for lane in T.vectorized(T.int64(LANES)):
                    sums[r, f, lane] = T.float32(0)
        for k in T.serial(T.int64(full)):
            for r in T.unroll(T.int64(count)):
                for f in T.unroll(T.int64(columns)):
                    for lane in T.vectorized(T.int64(LANES)):
                        sums[r, f, lane] = sums[r, f, lane] + (
                            x[row + r, k * LANES + lane]
                            * weight[T.min(feature + f, features - 1), k * LANES + lane]
                        )
        if has_rest:
            for r in T.unroll(T.int64(count)):
                for f in T.unroll(T.int64(columns)):
                    for lane in T.serial(T.int64(rest)):
                        sums[r, f, lane] = sums[r, f, lane] + (
                            x[row + r, full * LANES + lane]
                            * weight[T.min(feature + f, features - 1), full * LANES + lane]
                        )
        for r in T.unroll(T.int64(count)):
            for f in T.unroll(T.int64(columns)):
                for lane in T.vectorized(T.int64(8)):
                    sums[r, f, lane] = sums[r, f, lane] + sums[r, f, lane + 8]
                for lane in T.vectorized(T.int64(4)):
                    sums[r, f, lane] = sums[r, f, lane] + sums[r, f, lane + 4]
                for lane in T.vectorized(T.int64(2)):
                    sums[r, f, lane] = sums[r, f, lane] + sums[r, f, lane + 2]
                if feature + f < features:
                    out[row + r, feature + f] = sums[r, f, 0] + sums[r, f, 1]

    @T.prim_func(s_tir=True)
    def linear(x_handle: T.handle, weight_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        n = T.int64()
        x = T.match_buffer(x_handle, (n, width), "float32", align=4)
        weight = T.match_buffer(weight_handle, (features, width), "float32", align=4)
        out = T.match_buffer(out_handle, (n, features), "float32", align=4)
        for fo in T.parallel(T.int64(tiles)):
            sums = T.alloc_buffer((rows, columns, LANES), "float32", scope="local")
            for no in T.serial(n // rows):
                tile(x, weight, out, sums, rows, no * rows, fo * columns)
            for row in T.serial(n % rows):
                tile(x, weight, out, sums, 1, n // rows * rows + row, fo * columns)

    return linear
