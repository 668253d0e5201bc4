"""`memcompile::attention` with a cache by the compiled kernel library, which is linked into the artifact."""

from __future__ import annotations

import functools
from typing import Any, Final

from tvm.script import tirx as T

from memcompile.backends.tvm.kernels.arithmetic import OPAQUE
from memcompile.backends.tvm.kernels.attention import STORAGE, AttentionSizes
from memcompile.kernels import MAX_HEAD_WIDTH

# csrc/tvm.cpp
SYMBOL: Final = "mc_tvm_attention"


def library_takes(sizes: AttentionSizes) -> bool:
    """Whether the library has a kernel of these sizes."""
    even = sizes.bits != 4 or sizes.width % 2 == 0
    return sizes.width == sizes.value_width <= MAX_HEAD_WIDTH and even


@functools.cache
def library_attention_kernel(sizes: AttentionSizes, *, key_tile: int = 0, splits: int = 0) -> Any:
    """A call of the library with the arguments, results and caches of `attention_kernel`.

    Scales are always given, [1] when nothing is quantised, and after them the pattern, int32 [heads,4], or
    [1,4] where no key is chosen at run time. `key_tile` and `splits`: csrc/attention.h, 0 chooses. A call
    that the library refuses is a RuntimeError.
    """
    s = sizes
    heads, groups, width = s.heads, s.kv_heads, s.width
    stored, storage = s.stored[0], STORAGE[s.bits]
    scales = groups * width if s.bits else 1
    patterns = heads if s.pattern_block else 1
    align = 4 if not s.bits else 1

    @T.prim_func(s_tir=True)
    def library_attention(
        q_: T.handle, k_: T.handle, v_: T.handle, cache_k_: T.handle, cache_v_: T.handle,
        positions_: T.handle, query_at_: T.handle, first_slots_: T.handle,
        k_scale_: T.handle, v_scale_: T.handle, pattern_: T.handle, out_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch = T.int64()
        t_count = T.int64()
        slots = T.int64()
        shown = T.int64()
        q = T.match_buffer(q_, (batch, heads, t_count, width), "float32", align=4)
        k = T.match_buffer(k_, (batch, groups, t_count, width), "float32", align=4)
        v = T.match_buffer(v_, (batch, groups, t_count, width), "float32", align=4)
        cache_k = T.match_buffer(cache_k_, (batch, groups, slots, stored), storage, align=align)
        cache_v = T.match_buffer(cache_v_, (batch, groups, slots, stored), storage, align=align)
        positions = T.match_buffer(positions_, (batch, shown), "int64", align=8)
        query_at = T.match_buffer(query_at_, (batch, t_count), "int64", align=8)
        first_slots = T.match_buffer(first_slots_, (batch,), "int64", align=8)
        k_scale = T.match_buffer(k_scale_, (scales,), "float32", align=4)
        v_scale = T.match_buffer(v_scale_, (scales,), "float32", align=4)
        pattern = T.match_buffer(pattern_, (patterns, 4), "int32", align=4)
        out = T.match_buffer(out_, (batch, heads, t_count, width), "float32", align=4)
        assert (
            T.call_extern(
                "int32", SYMBOL, q.data, k.data, v.data, cache_k.data, cache_v.data, positions.data,
                query_at.data, first_slots.data, k_scale.data, v_scale.data, pattern.data, out.data,
                batch, t_count, slots, shown, T.int64(heads), T.int64(groups), T.int64(width),
                T.float32(s.scale), T.float32(s.softcap), T.int64(s.causal), T.int64(s.window),
                T.int64(s.sinks), T.int64(s.block), T.int64(s.stride), T.int64(s.bits),
                T.int64(s.pattern_block), T.int64(s.pattern_from), T.int64(key_tile), T.int64(splits),
            )
            == 0
        ), "the attention kernel refuses its sizes, or there is no memory left"  # fmt: skip

    return library_attention
