"""Check shapes, choose tile sizes, allocate, and start the kernels.

Shapes: B batch, T query tokens, S key slots, H query heads, G key/value heads, D width of queries and keys,
DV of values.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton

from memcompile.backends.torch.triton.decode import decode_kernel, merge_kernel
from memcompile.backends.torch.triton.prefill import prefill_kernel
from memcompile.backends.torch.triton.visits import plan_visits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256
# queries and keys of one block of a block mask
BLOCK_TOKENS = 64
# a split shorter than this costs more to merge than it gains
MIN_SPLIT_TOKENS = 256
# the interpreter multiplies the bit patterns of bfloat16, so there products are taken in float32
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is compiled: rows of queries, keys at a time, warps, depth of its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def prefill_tile(width: int, element_bytes: int, *, block_mask: bool = False) -> Tile:
    """The tile of `prefill_kernel`.

    Chosen so that the assembler spills nothing for sm_80 (132 bytes a thread in the last cell) and a
    program's shared
    memory fits the 99 KiB of sm_86 and sm_89: `python -m memcompile.backends.torch.triton.ahead` prints both.
    No GPU has timed it. A block mask has blocks of 64 queries, so a tile may not be taller.

    | width | half types | float32 |
    |---|---|---|
    | up to 64 | 128 rows, 64 keys, 4 warps, 3 stages | 64 rows, 32 keys, 4 warps, 2 stages |
    | up to 128 | 128 rows, 64 keys, 8 warps, 2 stages | 32 rows, 32 keys, 4 warps, 2 stages |
    | up to 256 | 64 rows, 64 keys, 8 warps, 1 stage | 16 rows, 32 keys, 4 warps, 1 stage |
    """
    half = element_bytes < 4
    if width <= 64:
        tile = Tile(128, 64, 4, 3) if half else Tile(64, 32, 4, 2)
    elif width <= 128:
        tile = Tile(128, 64, 8, 2) if half else Tile(32, 32, 4, 2)
    else:
        tile = Tile(64, 64, 8, 1) if half else Tile(16, 32, 4, 1)
    return Tile(BLOCK_TOKENS, tile.keys, 4, tile.stages) if block_mask and tile.rows > BLOCK_TOKENS else tile


def decode_tile(rows: int, width: int, element_bytes: int) -> Tile:
    """The tile of `decode_kernel`: all rows, at least the 16 that a matrix unit takes.

    | width | half types | float32 |
    |---|---|---|
    | up to 128 | 64 keys, 4 warps, 3 stages | 32 keys, 4 warps, 3 stages |
    | up to 256 | 32 keys, 8 warps, 2 stages | 32 keys, 8 warps, 1 stage |
    """
    padded_rows = max(16, int(triton.next_power_of_2(rows)))
    half = element_bytes < 4
    if width <= 128:
        return Tile(padded_rows, 64 if half else 32, 4, 3)
    return Tile(padded_rows, 32, 8, 2 if half else 1)


def max_decode_rows(element_bytes: int) -> int:
    """Rows of a decoding tile at most: query tokens times the query heads that share a key/value head."""
    return 64 if element_bytes < 4 else 16


def split_count(keys: int, programs: int, processors: int) -> int:
    """The number of parts `keys` are cut into: `programs` (batch x key/value heads) fill the device twice."""
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, -(-keys // MIN_SPLIT_TOKENS)))


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may look at whom, and how scores are made: the attributes of `memcompile::attention`."""

    scale: float
    causal: bool = True
    window: int = 0
    sinks: int = 0
    block: int = 0
    stride: int = 0
    softcap: float = 0.0

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SINKS": self.sinks,
            "BLOCK": max(self.block, 1),
            "STRIDE": self.stride,
            "SOFTCAP": self.softcap > 0.0,
            "WIDE": INTERPRETED,
        }


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values [B,G,S,D|DV] where they lie: floats, or int8 codes with scales float32 [G*D] and
    [G*DV].

    positions: int [B|1,S], -1 for an empty slot, which may hold anything.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        """8 for int8 codes, 0 for floats."""
        return 8 if self.k.dtype == torch.int8 else 0


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if q.dtype not in FLOATS:
        return f"queries of type {q.dtype}; the kernels take float32, bfloat16 and float16"
    if k.dtype != v.dtype or (k.dtype not in FLOATS and k.dtype != torch.int8):
        return f"keys and values of types {k.dtype} and {v.dtype}; the kernels take floats and int8"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads for {k.shape[1]} key/value heads"
    if q.shape[3] != k.shape[3] or max(q.shape[3], v.shape[3]) > MAX_WIDTH:
        return f"head widths {q.shape[3]}, {k.shape[3]} and {v.shape[3]}; the kernels go to {MAX_WIDTH}"
    return None


def prefill(
    q: torch.Tensor,
    q_positions: torch.Tensor,
    keys: Keys,
    rule: Rule,
    *,
    mask: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from q [B,H,T,D] at int positions [B|1,T]: the output [B,H,T,DV] and log-sum-exp float32
    [B,H,T].

    mask: additive or bool (True: may look), broadcastable to [B,H,T,S].
    block_mask: uint8 or bool [B|1,H|1,ceil(T/64),ceil(S/64)], 0 for blocks that are skipped, not masked.
    Raises ValueError for shapes and types that the kernels do not take.
    """
    _check(q, q_positions, keys)
    batch, heads, tokens, width = q.shape
    groups, slots, v_width = keys.v.shape[1:]
    element_bytes = q.element_size()
    tile = prefill_tile(max(width, v_width), element_bytes, block_mask=block_mask is not None)
    if block_mask is not None:
        wanted = (-(-tokens // BLOCK_TOKENS), -(-slots // BLOCK_TOKENS))
        if block_mask.shape[2:] != wanted:
            raise ValueError(
                f"block_mask covers {tuple(block_mask.shape[2:])} blocks, the tensors have {wanted}"
            )
        block_mask = block_mask.repeat_interleave(BLOCK_TOKENS // tile.rows, dim=2)[
            :, :, : -(-tokens // tile.rows)
        ]
        block_mask = block_mask.repeat_interleave(BLOCK_TOKENS // tile.keys, dim=3)[
            ..., : -(-slots // tile.keys)
        ]
    out = q.new_empty((batch, heads, tokens, v_width))
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    visits, counts = plan_visits(
        q_positions, keys.positions, rows=tile.rows, keys=tile.keys, causal=rule.causal, window=rule.window,
        sinks=rule.sinks, block=rule.block, stride=rule.stride,
        masked=mask is not None, block_mask=block_mask,
    )  # fmt: skip
    q, k, v = _rows(q), _rows(keys.k), _rows(keys.v)
    seen = None if mask is None else mask.expand(batch, heads, tokens, slots)
    prefill_kernel[(-(-tokens // tile.rows), batch * heads)](
        q, k, v, out, lse, _rows(q_positions), _rows(keys.positions),
        _or(keys.k_scale, q), _or(keys.v_scale, q), _bytes(_or(seen, q)), visits, counts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        _axis(q_positions, 0), _axis(keys.positions, 0), *((0, 0, 0, 0) if seen is None else seen.stride()),
        _axis(counts, 0) // 2, _axis(counts, 1) // 2,
        heads, tokens, slots, rule.scale, rule.softcap,
        REPEATS=heads // groups, D=width, DV=v_width, BLOCK_D=padded(width), BLOCK_DV=padded(v_width),
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, MASK=_mask_kind(mask), BITS=keys.bits, **rule.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def decode(
    q: torch.Tensor,
    q_positions: torch.Tensor,
    keys: Keys,
    rule: Rule,
    *,
    slots: torch.Tensor | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prefill` for few queries over many keys, split over the device: the same output and log-sum-exp.

    slots: int [B|1,G|1,K]: attend over these slots only, another choice for each key/value head; -1 for none.
    A slot must not stand twice. splits: how many parts the keys are cut into; by default as many as fill the
    device. Raises ValueError for shapes and types that the kernels do not take, or more rows of queries than
    `max_decode_rows`.
    """
    _check(q, q_positions, keys)
    batch, heads, tokens, width = q.shape
    groups, held, v_width = keys.v.shape[1:]
    rows = heads // groups * tokens
    if rows > max_decode_rows(q.element_size()):
        limit = max_decode_rows(q.element_size())
        raise ValueError(f"{rows} rows of queries a key/value head; decode takes {limit}, prefill any")
    count = held if slots is None else slots.shape[-1]
    if splits is None:
        splits = split_count(count, batch * groups, _processors(q.device))
    tile = decode_tile(rows, max(width, v_width), q.element_size())
    split_tokens = -(-max(count, 1) // splits)
    partial = q.new_empty((splits, batch, heads, tokens, v_width), dtype=torch.float32)
    partial_lse = q.new_empty((splits, batch, heads, tokens), dtype=torch.float32)
    q, k, v = _rows(q), _rows(keys.k), _rows(keys.v)
    chosen = None if slots is None else _rows(slots.expand(slots.shape[0], slots.shape[1], count))
    decode_kernel[(splits, batch * groups)](
        q, k, v, partial, partial_lse, _rows(q_positions), _rows(keys.positions), _or(chosen, q),
        _or(keys.k_scale, q), _or(keys.v_scale, q),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], _axis(q_positions, 0), _axis(keys.positions, 0),
        0 if chosen is None else _axis(chosen, 0), 0 if chosen is None else _axis(chosen, 1),
        batch, groups, tokens, count, split_tokens, rule.scale, rule.softcap,
        REPEATS=heads // groups, D=width, DV=v_width, BLOCK_D=padded(width), BLOCK_DV=padded(v_width),
        ROWS=tile.rows, BLOCK_N=tile.keys, CHOSEN=chosen is not None, BITS=keys.bits, **rule.constants(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return merge(partial, partial_lse, dtype=q.dtype)


def merge(
    partial: torch.Tensor, partial_lse: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention out of several over disjoint keys: [N,...,DV] and [N,...] become [...,DV] and [...]."""
    v_width = partial.shape[-1]
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    lse = partial_lse.new_empty(partial_lse.shape[1:])
    rows = lse.numel()
    merge_kernel[(rows,)](
        partial.contiguous(), partial_lse.contiguous(), out, lse, partial.shape[0], rows,
        DV=v_width, BLOCK_DV=padded(v_width),
    )  # fmt: skip
    return out, lse


def _check(q: torch.Tensor, q_positions: torch.Tensor, keys: Keys) -> None:
    reason = unsupported(q, keys.k, keys.v)
    if reason is not None:
        raise ValueError(reason)
    if keys.k.shape[:3] != keys.v.shape[:3] or keys.k.shape[0] != q.shape[0]:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(keys.k.shape)}, values {tuple(keys.v.shape)}"
        )
    for name, positions, length in (
        ("query", q_positions, q.shape[2]),
        ("key", keys.positions, keys.k.shape[2]),
    ):
        if positions.shape not in ((q.shape[0], length), (1, length)):
            raise ValueError(f"{name} positions {tuple(positions.shape)} for {q.shape[0]} rows of {length}")
    if keys.bits and (keys.k_scale is None or keys.v_scale is None):
        raise ValueError("int8 keys and values need k_scale and v_scale")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with a contiguous last axis, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _axis(x: torch.Tensor, axis: int) -> int:
    """The stride of an axis that may be broadcast: 0 where its size is 1."""
    return 0 if x.shape[axis] == 1 else x.stride(axis)


def _or(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Something to pass where the kernel reads nothing."""
    return other if x is None else x


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _mask_kind(mask: torch.Tensor | None) -> str:
    if mask is None:
        return "none"
    return "bool" if mask.dtype == torch.bool else "add"


def padded(width: int) -> int:
    """The power of two, at least 16, that a tile of `width` channels takes."""
    return max(16, int(triton.next_power_of_2(width)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
