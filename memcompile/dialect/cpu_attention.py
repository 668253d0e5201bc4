"""Attention over torch tensors on the CPU by the kernel library: nothing is copied."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Literal

import torch

from memcompile.kernels import (
    MAX_HEAD_WIDTH,
    TYPES,
    CAttention,
    CTensor,
    KernelLibrary,
    find_library,
)

_TYPES = {
    torch.float32: TYPES["float32"],
    torch.bfloat16: TYPES["bfloat16"],
    torch.float16: TYPES["float16"],
    torch.int8: TYPES["int8"],
    torch.uint8: TYPES["int4"],
}


def kernel_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    used: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_token_scale: torch.Tensor | None = None,
    v_token_scale: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    block_tokens: int = 0,
    pattern: torch.Tensor | None = None,
    pattern_block: int = 0,
    pattern_from: int = 0,
    bounds: torch.Tensor | None = None,
    page_tokens: int = 0,
    page_keep: int = 0,
    page_from: int = 0,
    slots: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    block: int = 0,
    stride: int = 0,
    softcap: float = 0.0,
    threads: int | None = None,
    splits: int = 0,
    key_tile: int = 0,
    products: Literal["float32", "bfloat16"] = "float32",
) -> torch.Tensor | None:
    """Attend from `q` [B,H,T,D] over all `keys` and `values` [B,G,S,D]; None when no kernel takes them.

    positions [B or 1,S], query_positions [B,T]: int64; used [B] int32; blocks [B,H,T/n,S/n] uint8;
    slots [B,G,N] int32, for decoding; lse [B,H,T] float32 is written. Token scales are [B,G,S] float32,
    channel scales [G*D]; pattern [H,4] int32, see memcompile/dialect/selection.py; bounds [B,G,pages,2W] in
    the cache's type, see memcompile/dialect/pages.py. Codes are int8, or uint8 with two int4 channels each.
    With `products` "bfloat16" prefill may round both sides of its products, whatever is stored.
    See csrc/attention.h.
    """
    if not takes(q, keys, values) or (library := cpu_library()) is None:
        return None
    batch, heads, tokens, width = q.shape
    groups, total = keys.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    call = CAttention(
        B=batch, T=tokens, S=total, H=heads, G=groups, D=width,
        q=_tensor(q), k=_tensor(keys), v=_tensor(values), out=_tensor(out),
        q_type=_TYPES[q.dtype], kv_type=_TYPES[keys.dtype], scale=scale, softcap=softcap,
        causal=causal, window=window, sinks=sinks, block=block, stride=stride,
        block_tokens=block_tokens if pattern is None else pattern_block, pattern_from=pattern_from,
        threads=torch.get_num_threads() if threads is None else threads,
        splits=splits, key_tile=key_tile, products=TYPES[products],
    )  # fmt: skip
    held: list[torch.Tensor] = []  # a converted copy must live as long as the call
    for name, tensor, dtype in (
        ("key_positions", positions, torch.int64), ("query_positions", query_positions, torch.int64),
        ("used", used, torch.int32), ("k_scale", k_scale, torch.float32), ("v_scale", v_scale, torch.float32),
        ("k_token_scale", k_token_scale, torch.float32), ("v_token_scale", v_token_scale, torch.float32),
        ("blocks", blocks, torch.uint8), ("slots", slots, torch.int32), ("pattern", pattern, torch.int32),
        ("lse", lse, torch.float32),
    ):  # fmt: skip
        if tensor is not None:
            held.append(tensor.detach().to(dtype).contiguous())
            setattr(call, name, held[-1].data_ptr())
    if positions is not None:
        call.positions_stride = total if positions.shape[0] > 1 else 0
    if blocks is not None:
        call.blocks_head = blocks.shape[2] * blocks.shape[3]
        call.blocks_batch = blocks.shape[1] * call.blocks_head
    if slots is not None:
        call.slot_count = slots.shape[2]
    if bounds is not None:
        call.bounds = _tensor(bounds)
        call.page_tokens, call.page_keep, call.page_from = page_tokens, page_keep, page_from
    library.attention(call)
    return out


def takes(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: on the CPU, up to 256 wide, channels adjacent."""
    width = q.shape[-1]
    codes = keys.dtype == torch.uint8
    return (
        all(t.device.type == "cpu" and (t.shape[-1] <= 1 or t.stride(-1) == 1) for t in (q, keys, values))
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and keys.dtype == values.dtype
        and (keys.dtype in (q.dtype, torch.int8) or codes)
        and 0 < width <= MAX_HEAD_WIDTH
        and not (codes and width % 2)
        and keys.shape == values.shape
        and keys.shape[-1] == (width // 2 if codes else width)
    )


@functools.cache
def cpu_library() -> KernelLibrary | None:
    """The kernel library, set to run on torch's own threads."""
    library = find_library()
    if library is not None and (parallel := _gomp_parallel()) is not None:
        library.handle.mc_use_gomp(parallel)
    return library


def _gomp_parallel() -> Any:
    # torch keeps its OpenMP threads spinning for a while: a second pool would fight them for the cores
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
    return None


def _tensor(x: torch.Tensor) -> CTensor:
    return CTensor(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))
