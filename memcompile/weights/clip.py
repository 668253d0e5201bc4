"""Shrink each block's grid to where the outputs change least: few large weights give way to many small ones.

The clipping search of Lin et al. 2024, "AWQ", arXiv:2306.00978, with the second moments of a block's inputs
in the place of a sample of them.
"""

from __future__ import annotations

from typing import Final

import torch

from memcompile.dialect.quantized_weights import QuantizedWeight, in_blocks, pack
from memcompile.weights.methods import Grid, ZeroPoint, plain_grid

# shares of a block's range that its grid may span
SHARES: Final = tuple(1 - step / 20 for step in range(10))


def clipped(
    weight: torch.Tensor, hessian: torch.Tensor, *, bits: int, block: int, zero_point: ZeroPoint
) -> QuantizedWeight:
    """Round a weight [N,K] to the grid of each block that loses least on inputs of that `hessian` [K,K]."""
    blocks = in_blocks(weight, block)
    grid = clipped_grid(blocks, block_moments(hessian, block), bits, zero_point)
    return QuantizedWeight(
        pack(grid.codes(blocks), bits),
        grid.scale.squeeze(-1),
        pack(grid.zero.squeeze(-1), bits) if zero_point == "integer" else None,
        grid.offset.squeeze(-1) if zero_point == "float" else None,
        bits,
        weight.shape[1],
    )


def block_moments(hessian: torch.Tensor, block: int) -> torch.Tensor:
    """The parts of a Hessian [K,K] on its diagonal, [blocks,block,block]; what is missing is zero."""
    width = hessian.shape[0]
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(hessian, (0, blocks * block - width, 0, blocks * block - width))
    places = torch.arange(blocks)
    return padded.reshape(blocks, block, blocks, block)[places, :, places, :]


def clipped_grid(blocks: torch.Tensor, moments: torch.Tensor, bits: int, zero_point: ZeroPoint) -> Grid:
    """The best of the grids that span a share of each block [N,blocks,block]."""
    best: Grid | None = None
    least = torch.empty(0)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    for share in SHARES:
        grid = plain_grid(torch.maximum(torch.minimum(blocks, high * share), low * share), bits, zero_point)
        error = grid.weight(grid.codes(blocks)) - blocks
        # sum over the block of e_i H_ij e_j, block by block
        spread = torch.bmm(error.transpose(0, 1), moments).transpose(0, 1)
        loss = (spread * error).sum(-1, keepdim=True)
        if best is None:
            best, least = grid, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = Grid(
            torch.where(better, grid.scale, best.scale),
            torch.where(better, grid.zero, best.zero),
            torch.where(better, grid.offset, best.offset),
            bits,
        )
    assert best is not None
    return best
