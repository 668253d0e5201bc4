"""How a weight becomes codes: round to nearest, and half-quadratic quantisation.

Both work on blocks [N,blocks,block] in float32, alone: no data is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from memcompile.dialect.quantized_weights import QuantizedWeight, in_blocks, middle_code, pack
from memcompile.weights.lazy import PIECE_BYTES, LazyTensor, Part, Producer
from memcompile.weights.parameter import LazyParameter

ZeroPoint = Literal["none", "integer", "float"]

# weights at a time: their blocks, and what is computed of them, stay in the processor's cache
TOGETHER: Final = 1 << 17
# Badri & Shaji 2023: the p of the error that counts, how strongly outliers are split off, and how often
HQQ_P: Final = 0.7
HQQ_BETA: Final = 10.0
HQQ_KAPPA: Final = 1.01
HQQ_STEPS: Final = 10


@dataclass(frozen=True)
class Grid:
    """The codes' grid of every block: `weight = scale * (code - zero) + offset`, each [N,blocks,1]."""

    scale: torch.Tensor
    zero: torch.Tensor
    offset: torch.Tensor
    bits: int

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest code of each weight, as floats."""
        divisor = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return torch.round((weight - self.offset) / divisor + self.zero).clamp(0, self.largest)

    def weight(self, codes: torch.Tensor) -> torch.Tensor:
        return self.scale * (codes - self.zero) + self.offset

    def of_block(self, index: int) -> Grid:
        """The grid of one block, [N]."""
        return Grid(self.scale[:, index, 0], self.zero[:, index, 0], self.offset[:, index, 0], self.bits)


Method = Callable[[torch.Tensor, Grid, ZeroPoint], Grid]


def quantize(
    weight: torch.Tensor, *, bits: int, block: int, zero_point: ZeroPoint, method: str
) -> QuantizedWeight:
    """Quantise a weight [N,K] by the method of that name.

    Of a weight that is on disk the tensors are lazy too, and computed when they are written.
    """
    if isinstance(weight, LazyParameter):
        return _lazily(QuantizeRows(weight.expression, bits, block, zero_point, method))
    rows = max(1, TOGETHER // weight.shape[1])
    parts = [
        _quantize_rows(some, bits, block, zero_point, METHODS[method]) for some in torch.split(weight, rows)
    ]
    codes, scales, zeros, offsets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(
        codes,
        scales,
        pack(zeros, bits) if zero_point == "integer" else None,
        offsets if zero_point == "float" else None,
        bits,
        weight.shape[1],
    )


@dataclass(frozen=True)
class QuantizeRows:
    """A weight as codes, made a few rows at a time."""

    source: LazyTensor
    bits: int
    block: int
    zero_point: ZeroPoint
    method: str

    def produce(self) -> dict[str, torch.Tensor]:
        # the same rows at once as for a weight in memory, so that the codes are the same to the last bit
        step = max(1, TOGETHER // self.source.shape[1])
        step *= max(1, PIECE_BYTES // (step * self.source.shape[1] * 4))
        return in_rows(self.source.rows, step, self.rows)

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        return quantize(
            self.source.read(begin, end), bits=self.bits, block=self.block, zero_point=self.zero_point,
            method=self.method,
        )  # fmt: skip


def in_rows(rows: int, step: int, make: Callable[[int, int], QuantizedWeight]) -> dict[str, torch.Tensor]:
    """The tensors of a weight of so many rows, made `step` rows at a time."""
    whole: dict[str, torch.Tensor] = {}
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        for name, tensor in make(begin, end).tensors().items():
            if name not in whole:
                whole[name] = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
            whole[name][begin:end] = tensor
    return whole


def _lazily(producer: QuantizeRows) -> QuantizedWeight:
    """The tensors that the producer will give: their shapes follow from those of one row."""
    rows, width = producer.source.shape
    row = quantize(
        torch.zeros(1, width), bits=producer.bits, block=producer.block, zero_point=producer.zero_point,
        method=producer.method,
    )  # fmt: skip
    return lazy_weight(producer, row, rows)


def lazy_weight(producer: Producer, row: QuantizedWeight, rows: int) -> QuantizedWeight:
    """A quantised weight [rows,K] whose tensors are what `producer` gives, by the names of the fields.

    `row` is one row of such a weight: shapes and types are taken from it.
    """
    parts: dict[str, Any] = {
        name: LazyParameter(
            # all rows share a table
            Part(
                producer,
                name,
                tuple(tensor.shape) if name == "table" else (rows, *tensor.shape[1:]),
                tensor.dtype,
            )
        )
        for name, tensor in row.tensors().items()
    }
    return dataclasses.replace(row, **parts)


def _quantize_rows(
    weight: torch.Tensor, bits: int, block: int, zero_point: ZeroPoint, method: Method
) -> tuple[torch.Tensor, ...]:
    blocks = in_blocks(weight, block)
    grid = method(blocks, plain_grid(blocks, bits, zero_point), zero_point)
    codes = pack(grid.codes(blocks), bits)
    return codes, grid.scale.squeeze(-1), grid.zero.squeeze(-1), grid.offset.squeeze(-1)


def plain_grid(blocks: torch.Tensor, bits: int, zero_point: ZeroPoint) -> Grid:
    """The grid that spans each block.

    Without zero points the value of largest magnitude takes code 0, so that no code is wasted (as GGUF's Q4_0
    does); with them the codes run from the smallest to the largest value.
    """
    steps, middle = (1 << bits) - 1, float(middle_code(bits))
    smallest, largest = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if zero_point == "none":
        extreme = torch.where(-smallest >= largest, smallest, largest)
        scale = extreme / -middle
        zero = torch.full_like(scale, middle)
        return Grid(scale, zero, torch.zeros_like(scale), bits)
    if zero_point == "float":
        scale = (largest - smallest) / steps
        zero = torch.full_like(scale, middle)
        return Grid(scale, zero, smallest + scale * middle, bits)
    # an integer zero point must be one of the codes: the range holds zero
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scale = (largest - smallest) / steps
    zero = torch.round(-smallest / torch.where(scale == 0, torch.ones_like(scale), scale)).clamp(0, steps)
    return Grid(scale, zero, torch.zeros_like(scale), bits)


def round_to_nearest(blocks: torch.Tensor, grid: Grid, zero_point: ZeroPoint) -> Grid:
    """Take the grid that spans the block."""
    del blocks, zero_point
    return grid


def half_quadratic(blocks: torch.Tensor, grid: Grid, zero_point: ZeroPoint) -> Grid:
    """Fit the grid to |error|^p, p < 1, so that few large errors weigh less than many small ones.

    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": a sparse part of
    the error is split off (by the shrinkage of the p-norm), the grid is fitted in closed form to the rest.
    The original fits a float zero point; where the format has only integers or none, the scale is fitted.
    Errors are counted in steps of the grid, so that one beta serves all weights. Each block keeps the grid
    with the smallest sum of |error| that it saw.
    """
    unit = torch.where(grid.scale == 0, torch.ones_like(grid.scale), grid.scale).abs()
    beta = HQQ_BETA
    best, best_size = grid, torch.full_like(grid.scale, torch.inf)
    for step in range(HQQ_STEPS + 1):
        codes = grid.codes(blocks)
        error = (blocks - grid.weight(codes)) / unit
        size = error.abs().sum(-1, keepdim=True)
        better = size < best_size
        best_size = torch.where(better, size, best_size)
        best = Grid(
            torch.where(better, grid.scale, best.scale),
            grid.zero,
            torch.where(better, grid.offset, best.offset),
            grid.bits,
        )
        if step == HQQ_STEPS:
            break
        target = blocks - _shrink(error, beta) * unit
        levels = codes - grid.zero
        if zero_point == "float":
            offset = (target - grid.scale * levels).mean(-1, keepdim=True)
            grid = Grid(grid.scale, grid.zero, offset, grid.bits)
        else:
            power = (levels * levels).sum(-1, keepdim=True)
            scale = (levels * target).sum(-1, keepdim=True) / power.clamp(min=1)
            grid = Grid(torch.where(power > 0, scale, grid.scale), grid.zero, grid.offset, grid.bits)
        beta *= HQQ_KAPPA
    return best


def _shrink(error: torch.Tensor, beta: float) -> torch.Tensor:
    """The proximal step of |x|^p, approximately: sign(x) * max(|x| - |x|^(p-1) / beta, 0)."""
    size = error.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.sign(error) * (size - size.pow(HQQ_P - 1) / beta).clamp(min=0)


METHODS: Final[dict[str, Method]] = {"rtn": round_to_nearest, "hqq": half_quadratic}
