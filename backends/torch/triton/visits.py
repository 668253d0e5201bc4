"""Which blocks of keys each tile of queries has to visit, from positions and a block mask, on the device
itself.

Shapes: B batch, H query heads, T query tokens, S keys, tiles ceil(T/rows), blocks ceil(S/keys).
"""

from __future__ import annotations

import torch

_FAR = 2**31 - 1


def plan_visits(
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    *,
    rows: int,
    keys: int,
    causal: bool,
    window: int,
    sinks: int,
    block: int,
    stride: int,
    masked: bool = False,
    block_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks to visit, int32 [B|1,H|1,tiles,blocks], and how many, int32 [B|1,H|1,tiles,2].

    rows, keys: queries of a tile, keys of a block.
    q_positions, k_positions: int [B|1,T] and [B|1,S], in any order, -1 for none. A block is left out when no
    pair in it can be visible; a row of `counts` holds the number of blocks in which every pair is visible
    (they come first) and of all blocks to visit. `masked`: a run-time mask is applied too, so no block counts
    as wholly visible.
    block_mask: uint8 or bool [B|1,H|1,tiles,blocks], 0 for a block to skip.
    """
    q_low, q_high, q_any, q_all = (x.unsqueeze(-1) for x in _extent(q_positions, rows))
    k_low, k_high, k_any, k_all = (x.unsqueeze(-2) for x in _extent(k_positions, keys))
    live, whole = q_any & k_any, q_all & k_all
    if causal:
        live = live & (k_low <= q_high)
        whole = whole & (k_high <= q_low)
    if window > 0:
        nearest, farthest = q_low - k_high, q_high - k_low
        if not causal:
            nearest = torch.maximum(nearest, k_low - q_high)
            farthest = torch.maximum(farthest, k_high - q_low)
        some, every = nearest < window, farthest < window
        some, every = some | (k_low < sinks), every | (k_high < sinks)
        if stride > 0:
            chosen = (torch.div(k_positions, block, rounding_mode="floor") % stride == 0) & (k_positions >= 0)
            tiled = _tiles(chosen.to(torch.int32), keys, 0)
            some = some | tiled.amax(-1).bool().unsqueeze(-2)
            every = every | tiled.amin(-1).bool().unsqueeze(-2)
        live, whole = live & some, whole & every
    # 2: every pair is visible, 1: some may be, 0: none is
    code = live.to(torch.int32) + (whole & live & (not masked)).to(torch.int32)
    code = code.unsqueeze(1)
    if block_mask is not None:
        code = code * (block_mask != 0).to(torch.int32)
    order = torch.argsort(code, dim=-1, descending=True, stable=True)
    counts = torch.stack(((code == 2).sum(-1), (code > 0).sum(-1)), dim=-1)
    return order.to(torch.int32).contiguous(), counts.to(torch.int32).contiguous()


def _tiles(values: torch.Tensor, size: int, fill: int) -> torch.Tensor:
    """[B,S] as [B,ceil(S/size),size], the last tile filled up."""
    missing = -values.shape[-1] % size
    return torch.nn.functional.pad(values, (0, missing), value=fill).reshape(values.shape[0], -1, size)


def _extent(positions: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Of each tile: lowest and highest position, whether any slot is held, whether all of them are."""
    tiled = _tiles(positions.to(torch.int64), size, -1)
    held = tiled >= 0
    low = torch.where(held, tiled, _FAR).amin(-1)
    return low, tiled.amax(-1), held.any(-1), held.all(-1)
