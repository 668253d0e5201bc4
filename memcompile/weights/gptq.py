"""GPTQ: round the columns of a weight one after another, and let those to come make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323.
"""

from __future__ import annotations

from typing import Final

import torch

from memcompile.dialect.quantized_weights import QuantizedWeight, in_blocks, pack
from memcompile.weights.clip import clipped_grid
from memcompile.weights.methods import Grid, ZeroPoint, plain_grid

# of the mean of the Hessian's diagonal, added to it (the paper's value)
DAMP: Final = 0.01
# columns whose errors are spread at once
COLUMNS: Final = 128


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

    hessian: the sum of x xᵀ over calibration inputs x, [K,K]. The grid of a block is the one that spans it
    when its turn comes, after the errors of the blocks before it were spread; with `clip` the best share of
    that span.
    """
    rows, width = weight.shape
    blocks = in_blocks(weight, block)
    columns = blocks.flatten(1).clone()
    spread = _spreading(hessian, columns.shape[1])
    # what an error in a column costs once those after it have made up for it
    costs = torch.diag_embed(spread.diagonal().pow(-2).reshape(-1, block))
    codes = torch.empty_like(columns)
    grids: list[Grid] = []
    step = max(COLUMNS, block)
    for begin in range(0, columns.shape[1], step):
        end = min(begin + step, columns.shape[1])
        errors = torch.empty(rows, end - begin)
        for column in range(begin, end):
            if column % block == 0:
                # one block [N,1,block]: its grid is [N,1,1]
                part, index = columns[:, None, column : column + block], column // block
                grids.append(
                    clipped_grid(part, costs[index : index + 1], bits, zero_point)
                    if clip
                    else plain_grid(part, bits, zero_point)
                )
            grid, value = grids[-1], columns[:, column].reshape(-1, 1, 1)
            code = grid.codes(value)
            codes[:, column] = code.flatten()
            error = (value - grid.weight(code)).flatten() / spread[column, column]
            errors[:, column - begin] = error
            columns[:, column:end] -= torch.outer(error, spread[column, column:end])
        columns[:, end:] -= errors @ spread[begin:end, end:]
    scales, zeros, offsets = (
        torch.cat([getattr(grid, name).reshape(rows, 1) for grid in grids], dim=1)
        for name in ("scale", "zero", "offset")
    )
    return QuantizedWeight(
        pack(codes.reshape(blocks.shape), bits),
        scales,
        pack(zeros, bits) if zero_point == "integer" else None,
        offsets if zero_point == "float" else None,
        bits,
        width,
    )


def _spreading(hessian: torch.Tensor, columns: int) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, float32 [columns,columns]."""
    wide = torch.eye(columns, dtype=torch.float64)
    width = hessian.shape[0]
    wide[:width, :width] = hessian.double()
    diagonal = wide.diagonal()
    # an input that was always zero has nothing to say; it must only stay invertible
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMP * hessian.diagonal().double().mean().clamp(min=1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
