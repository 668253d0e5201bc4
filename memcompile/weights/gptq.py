"""GPTQ: round the columns of a weight one after another, and let those to come make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. As its authors' program does on demand ("act-order" with "static groups"), columns whose
inputs are largest come first, and the grid of a block is found before any error was spread: an error never
stretches the grid of the block that takes it up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Protocol

import torch

from memcompile.dialect.quantized_weights import QuantizedWeight, in_blocks, pack
from memcompile.weights.clip import clipped_grid
from memcompile.weights.codebook import TableGrid, codebook
from memcompile.weights.methods import ZeroPoint, plain_grid

# of the mean of the Hessian's diagonal, added to it (the paper's value)
DAMP: Final = 0.01
# columns whose errors are spread at once
COLUMNS: Final = 64


class Codes(Protocol):
    """What codes stand for, a grid or a table: of blocks [N,blocks,block], or of one block's columns, [N]."""

    def codes(self, weight: torch.Tensor) -> torch.Tensor: ...

    def weight(self, codes: torch.Tensor) -> torch.Tensor: ...

    def of_block(self, index: int) -> Codes: ...


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    block: int,
    zero_point: ZeroPoint,
    clip: bool = False,
) -> QuantizedWeight:
    """Quantise a weight [N,K] so that its products with the inputs behind `hessian` change least.

    hessian: the sum of x xᵀ over calibration inputs x, [K,K]. The grid of a block spans it; with `clip` the
    share of it that loses least once other columns have made up for errors.
    """
    blocks = in_blocks(weight, block)
    spread = Spread(hessian, blocks[0].numel())
    grid = (
        clipped_grid(blocks, torch.diag_embed(spread.costs.reshape(-1, block)), bits, zero_point)
        if clip
        else plain_grid(blocks, bits, zero_point)
    )
    return QuantizedWeight(
        pack(spread.codes(blocks, grid), bits),
        grid.scale.squeeze(-1),
        pack(grid.zero.squeeze(-1), bits) if zero_point == "integer" else None,
        grid.offset.squeeze(-1) if zero_point == "float" else None,
        bits,
        weight.shape[1],
    )


def gptq_codebook(weight: torch.Tensor, hessian: torch.Tensor, *, bits: int, block: int) -> QuantizedWeight:
    """The same with codes of a table, that of `codebook`, and its scales."""
    blocks = in_blocks(weight, block)
    spread = Spread(hessian, blocks[0].numel())
    found = codebook(weight, bits=bits, block=block, moments=spread.costs[: weight.shape[1]])
    assert found.table is not None
    codes = spread.codes(blocks, TableGrid(found.scales.unsqueeze(-1), found.table))
    return replace(found, codes=pack(codes, bits))


class Spread:
    """How the error of each column is made up for by others, for inputs of a Hessian [K,K].

    costs [columns]: what a squared error in a column costs once the columns after it have made up for it.
    columns: K, or more where the last block was filled up.
    """

    def __init__(self, hessian: torch.Tensor, columns: int) -> None:
        width = hessian.shape[0]
        self._hessian = torch.zeros(columns, columns)
        self._hessian[:width, :width] = hessian
        diagonal = self._hessian.diagonal()
        self._order = torch.argsort(diagonal, descending=True, stable=True)
        wide = self._hessian.double()[self._order][:, self._order]
        # an input that was always zero has nothing to say; it must only stay invertible
        wide.diagonal()[wide.diagonal() == 0] = 1.0
        wide.diagonal().add_(DAMP * hessian.diagonal().double().mean().clamp(min=1e-12))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
        self._factor = torch.linalg.cholesky(inverse, upper=True).float()
        self.costs = torch.empty(columns)
        self.costs[self._order] = self._factor.diagonal().pow(-2)

    def codes(self, blocks: torch.Tensor, grid: Codes) -> torch.Tensor:
        """Codes of a weight's blocks [N,blocks,block] on a grid, uint8.

        A row whose outputs would change more so than by rounding is rounded.
        """
        rows, _, block = blocks.shape
        # a column a row: they are read and written one after another
        left = blocks.reshape(rows, -1).T[self._order].contiguous()
        found = torch.empty(left.shape, dtype=torch.uint8)
        grids = [grid.of_block(index) for index in range(blocks.shape[1])]
        for begin in range(0, len(left), COLUMNS):
            end = min(begin + COLUMNS, len(left))
            errors = torch.empty(end - begin, rows)
            for column in range(begin, end):
                share = self._factor[column, column:end]
                one = grids[int(self._order[column]) // block]
                code = one.codes(left[column])
                found[column] = code
                error = errors[column - begin]
                torch.div(left[column] - one.weight(code), share[0], out=error)
                left[column:end].addr_(share, error, alpha=-1)
            left[end:].addmm_(self._factor[begin:end, end:].T, errors, alpha=-1)
        codes = torch.empty_like(found)
        codes[self._order] = found
        codes = codes.T.reshape(blocks.shape)
        rounded = grid.codes(blocks).to(torch.uint8)
        worse = self._loss(grid.weight(codes) - blocks) > self._loss(grid.weight(rounded) - blocks)
        return torch.where(worse[:, None, None], rounded, codes)

    def _loss(self, error: torch.Tensor) -> torch.Tensor:
        """What errors [N,blocks,block] of a weight do to the output of each row, [N]."""
        flat = error.flatten(1)
        return ((flat @ self._hessian) * flat).sum(1)
