"""`memcompile::attention` with a cache, for CUDA: a block of threads a query, online softmax over key blocks.

Each thread scores one key, the block reduces, then each thread sums over the block's values for its channels.
Compiled and emulated, never run on a GPU: see docs/backends/tvm.md.
"""

from __future__ import annotations

from typing import Any, Final

from tvm.script import tirx as T

from memcompile.backends.tvm.kernels.arithmetic import OPAQUE
from memcompile.backends.tvm.kernels.attention import LOWEST, STORAGE, AttentionSizes

THREADS: Final = 128


def cuda_attention_kernel(sizes: AttentionSizes) -> Any:
    """The same arguments, results and caches as `attention_kernel`."""
    s = sizes
    heads, groups, width, value_width = s.heads, s.kv_heads, s.width, s.value_width
    stored, value_stored = s.stored
    repeats = heads // groups
    parts, value_parts = -(-width // THREADS), -(-value_width // THREADS)
    storage = STORAGE[s.bits]
    plain, bytewise, packed = s.bits == 0, s.bits == 8, s.bits == 4

    @T.inline
    def append(new, cache, scale, b, g, t, slot, thread, channels, elements):
        for part in T.serial(T.int64(-(-elements // THREADS))):
            if part * THREADS + thread < elements:
                if plain:
                    cache[b, g, slot, part * THREADS + thread] = new[b, g, t, part * THREADS + thread]
                if bytewise:
                    cache[b, g, slot, part * THREADS + thread] = T.Cast(
                        "int8",
                        s.code(
                            new[b, g, t, part * THREADS + thread],
                            scale[g * channels + part * THREADS + thread],
                        ),
                    )
                if packed:
                    cache[b, g, slot, part * THREADS + thread] = s.pair(
                        new, scale, b, g, t, part * THREADS + thread, channels
                    )

    @T.inline
    def attend(
        q, k, v, cache_k, cache_v, positions, query_at, first_slots, k_scale, v_scale, out,
        batch, t_count, slots, shown,
    ):  # fmt: skip
        for block in T.thread_binding(batch * groups * t_count, thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(THREADS), thread="threadIdx.x"):
                b = block // (groups * t_count)
                g = block // t_count % groups
                t = block % t_count
                slot = first_slots[b] + t
                if T.And(slot >= 0, slot < slots):
                    append(k, cache_k, k_scale, b, g, t, slot, thread, width, stored)
                    append(v, cache_v, v_scale, b, g, t, slot, thread, value_width, value_stored)
        for block in T.thread_binding(batch * heads * t_count, thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(THREADS), thread="threadIdx.x"):
                b = block // (heads * t_count)
                h = block // t_count % heads
                t = block % t_count
                g = h // repeats
                query = T.alloc_buffer((width,), "float32", scope="shared")
                weights = T.alloc_buffer((THREADS,), "float32", scope="shared")
                scratch = T.alloc_buffer((THREADS,), "float32", scope="shared")
                sums = T.alloc_buffer((value_parts,), "float32", scope="local")
                # maximum and sum so far, new maximum or one weight, own score or the old sums' factor
                running = T.alloc_buffer((4,), "float32", scope="local")
                key = T.alloc_buffer((1,), "int32", scope="local")
                for part in T.serial(T.int64(parts)):
                    if part * THREADS + thread < width:
                        query[part * THREADS + thread] = q[b, h, t, part * THREADS + thread] * T.float32(
                            s.scale
                        )
                running[0] = T.float32(LOWEST)
                running[1] = T.float32(0)
                for part in T.serial(T.int64(value_parts)):
                    sums[part] = T.float32(0)
                T.tvm_storage_sync("shared")
                for kb in T.serial((shown + THREADS - 1) // THREADS):
                    key[0] = T.int32(-1)
                    running[3] = T.float32(0)
                    if kb * THREADS + thread < T.min(shown, slots):
                        key[0] = T.Cast("int32", positions[b, kb * THREADS + thread])
                    if s.visible(T.Cast("int32", query_at[b, t]), key[0]):
                        for d in T.serial(T.int64(width)):
                            running[3] = running[3] + query[d] * s.value(
                                cache_k, k_scale, b, g, kb * THREADS + thread, d, width
                            )
                        running[3] = s.capped(running[3])
                    else:
                        running[3] = T.float32(LOWEST)
                    scratch[thread] = running[3]
                    T.tvm_storage_sync("shared")
                    for step in T.serial(T.int64(7)):
                        if thread < T.shift_right(T.int64(THREADS // 2), step):
                            scratch[thread] = T.max(
                                scratch[thread],
                                scratch[thread + T.shift_right(T.int64(THREADS // 2), step)],
                            )
                        T.tvm_storage_sync("shared")
                    running[2] = T.max(running[0], scratch[0])
                    weights[thread] = T.if_then_else(
                        running[3] > T.float32(LOWEST / 2), T.exp(running[3] - running[2]), T.float32(0)
                    )
                    # becomes the factor by which older sums shrink
                    running[3] = T.exp(running[0] - running[2])
                    running[0] = running[2]
                    T.tvm_storage_sync("shared")
                    running[1] = running[1] * running[3]
                    for other in T.serial(T.int64(THREADS)):
                        running[1] = running[1] + weights[other]
                    for part in T.serial(T.int64(value_parts)):
                        sums[part] = sums[part] * running[3]
                        if part * THREADS + thread < value_width:
                            for other in T.serial(T.int64(THREADS)):
                                running[2] = weights[other]
                                # 0 * NaN would spread what an empty slot holds
                                if running[2] > T.float32(0):
                                    sums[part] = sums[part] + running[2] * s.value(
                                        cache_v, v_scale, b, g, kb * THREADS + other,
                                        part * THREADS + thread, value_width,
                                    )  # fmt: skip
                    T.tvm_storage_sync("shared")
                for part in T.serial(T.int64(value_parts)):
                    if part * THREADS + thread < value_width:
                        out[b, h, t, part * THREADS + thread] = T.if_then_else(
                            running[1] > T.float32(0), sums[part] / running[1], T.float32(0)
                        )

    if plain:

        @T.prim_func(s_tir=True)
        def cuda_attention(
            q_: T.handle, k_: T.handle, v_: T.handle, cache_k_: T.handle, cache_v_: T.handle,
            positions_: T.handle, query_at_: T.handle, first_slots_: T.handle, out_: T.handle,
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
            batch = T.int64()
            t_count = T.int64()
            slots = T.int64()
            shown = T.int64()
            q = T.match_buffer(q_, (batch, heads, t_count, width), "float32", align=4)
            k = T.match_buffer(k_, (batch, groups, t_count, width), "float32", align=4)
            v = T.match_buffer(v_, (batch, groups, t_count, value_width), "float32", align=4)
            cache_k = T.match_buffer(cache_k_, (batch, groups, slots, stored), storage, align=4)
            cache_v = T.match_buffer(cache_v_, (batch, groups, slots, value_stored), storage, align=4)
            positions = T.match_buffer(positions_, (batch, shown), "int64", align=8)
            query_at = T.match_buffer(query_at_, (batch, t_count), "int64", align=8)
            first_slots = T.match_buffer(first_slots_, (batch,), "int64", align=8)
            out = T.match_buffer(out_, (batch, heads, t_count, value_width), "float32", align=4)
            attend(
                q, k, v, cache_k, cache_v, positions, query_at, first_slots, q, q, out,
                batch, t_count, slots, shown,
            )  # fmt: skip

        return cuda_attention

    @T.prim_func(s_tir=True)
    def cuda_quantized_attention(
        q_: T.handle, k_: T.handle, v_: T.handle, cache_k_: T.handle, cache_v_: T.handle,
        positions_: T.handle, query_at_: T.handle, first_slots_: T.handle,
        k_scale_: T.handle, v_scale_: T.handle, out_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        batch = T.int64()
        t_count = T.int64()
        slots = T.int64()
        shown = T.int64()
        q = T.match_buffer(q_, (batch, heads, t_count, width), "float32", align=4)
        k = T.match_buffer(k_, (batch, groups, t_count, width), "float32", align=4)
        v = T.match_buffer(v_, (batch, groups, t_count, value_width), "float32", align=4)
        cache_k = T.match_buffer(cache_k_, (batch, groups, slots, stored), storage, align=1)
        cache_v = T.match_buffer(cache_v_, (batch, groups, slots, value_stored), storage, align=1)
        positions = T.match_buffer(positions_, (batch, shown), "int64", align=8)
        query_at = T.match_buffer(query_at_, (batch, t_count), "int64", align=8)
        first_slots = T.match_buffer(first_slots_, (batch,), "int64", align=8)
        k_scale = T.match_buffer(k_scale_, (groups * width,), "float32", align=4)
        v_scale = T.match_buffer(v_scale_, (groups * value_width,), "float32", align=4)
        out = T.match_buffer(out_, (batch, heads, t_count, value_width), "float32", align=4)
        attend(
            q, k, v, cache_k, cache_v, positions, query_at, first_slots, k_scale, v_scale, out,
            batch, t_count, slots, shown,
        )  # fmt: skip

    return cuda_quantized_attention
