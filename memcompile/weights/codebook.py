"""Weights as codes of a learned table: k-means over the values that occur, each counted once.

Cho et al. 2023, "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models",
arXiv:2309.00964, clusters while it trains. Taken over are the table, and that 16-bit values are at most
65,536 different ones, so that clustering works on their counts and not on the weights (its uniquification).
Without training, one table does not fit rows of different size: each block of weights is first divided by the
value of largest magnitude in it, which becomes its scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch

from memcompile.dialect.quantized_weights import QuantizedWeight, in_blocks, pack
from memcompile.weights.lazy import PIECE_BYTES, LazyTensor
from memcompile.weights.methods import METHODS, TOGETHER, ZeroPoint, in_rows, lazy_weight, quantize
from memcompile.weights.parameter import LazyParameter, evaluated

# starts of k-means that are compared, and rounds of one
STARTS: Final = 16
ROUNDS: Final = 200
# of a 16-bit value
_VALUES: Final = 1 << 16


@dataclass(frozen=True)
class TableGrid:
    """What codes of a table stand for in every block: `weight = scale * table[code]`, scale [N,blocks,1]."""

    scale: torch.Tensor
    table: torch.Tensor

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The code of each weight whose value is nearest."""
        return torch.bucketize(weight / self.scale, (self.table[1:] + self.table[:-1]) / 2)

    def weight(self, codes: torch.Tensor) -> torch.Tensor:
        return self.scale * self.table[codes.long()]

    def of_block(self, index: int) -> TableGrid:
        """That of one block, scale [N]."""
        return TableGrid(self.scale[:, index, 0], self.table)


def cluster(values: torch.Tensor, counts: torch.Tensor, clusters: int) -> torch.Tensor:
    """The centres of k-means over `values` [n], ascending and different, which weigh `counts` [n] each.

    float64 [clusters], ascending; some are equal where there are fewer values. Starts are drawn by k-means++
    (Arthur & Vassilvitskii 2007), always the same ones; the best result of `STARTS` counts. Clusters of
    numbers are intervals, so that a round of Lloyd's takes sums over intervals, and not distances.
    """
    values, counts = values.double(), counts.double()
    mass, moment, square = (
        torch.nn.functional.pad(each.cumsum(0), (1, 0))
        for each in (counts, counts * values, counts * values.square())
    )
    generator = torch.Generator().manual_seed(0)
    best, least = torch.empty(0), torch.inf
    for _ in range(STARTS):
        centres = _start(values, counts, clusters, generator)
        ends, weight = torch.empty(0, dtype=torch.int64), torch.empty(0)
        for _ in range(ROUNDS):
            inner = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
            found = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(values))])
            if torch.equal(found, ends):
                break
            ends = found
            weight = mass[ends].diff()
            centres = torch.where(weight > 0, moment[ends].diff() / weight.clamp(min=1e-300), centres)
        loss = float((square[ends].diff() - 2 * centres * moment[ends].diff() + centres**2 * weight).sum())
        if loss < least:
            best, least = centres, loss
    return best


def _start(
    values: torch.Tensor, counts: torch.Tensor, clusters: int, generator: torch.Generator
) -> torch.Tensor:
    """Values, each drawn by its count times its squared distance from those drawn before."""
    distance = torch.full_like(values, torch.inf)
    chances = counts.cumsum(0)
    centres: list[torch.Tensor] = []
    for _ in range(clusters):
        at = torch.rand(1, generator=generator, dtype=torch.float64) * chances[-1]
        index = torch.searchsorted(chances, at, right=True).clamp(max=len(values) - 1)
        centres.append(values[index])
        distance = torch.minimum(distance, (values - values[index]).square())
        chances = (counts * distance).cumsum(0)
    return torch.cat(centres).sort().values


def codebook(
    weight: torch.Tensor, *, bits: int, block: int, moments: torch.Tensor | None = None
) -> QuantizedWeight:
    """A weight [N,K] as codes of one table of 2**bits values, and a scale a block.

    moments: how much an error of each input counts, [K], such as the mean of its square; None: all the same.
    Of a weight that is on disk the tensors, without moments, are lazy too: computed when they are written.
    """
    if isinstance(weight, LazyParameter) and moments is None:
        rows, width = weight.shape
        row = codebook(torch.zeros(1, width), bits=bits, block=block)
        return lazy_weight(CodebookRows(weight.expression, bits, block), row, rows)
    weight = evaluated(weight)
    # where no input was ever other than zero, no error counts: they all do then
    known = moments if moments is not None and bool(moments.any()) else torch.ones(weight.shape[1])
    counts = in_blocks(known[None], block)
    parts = torch.split(weight, max(1, TOGETHER // weight.shape[1]))
    table = _table(parts, counts, bits)
    found = [_codes(part, counts, table, bits) for part in parts]
    codes, scales = (torch.cat([getattr(part, name) for part in found]) for name in ("codes", "scales"))
    return replace(found[0], codes=codes, scales=scales, table=table)


def quantize_without_data(
    weight: torch.Tensor, *, bits: int, block: int, zero_point: ZeroPoint, method: str
) -> QuantizedWeight:
    """A weight by the method of that name; by rounding, where the method needs calibration data."""
    if method == "kmeans":
        return codebook(weight, bits=bits, block=block)
    method = method if method in METHODS else "rtn"
    return quantize(weight, bits=bits, block=block, zero_point=zero_point, method=method)


@dataclass(frozen=True)
class CodebookRows:
    """A weight as codes of one table, read twice: for the table, and for the codes."""

    source: LazyTensor
    bits: int
    block: int

    def produce(self) -> dict[str, torch.Tensor]:
        rows, width = self.source.shape
        # the same rows at once as for a weight in memory, so that the codes are the same to the last bit
        together = max(1, TOGETHER // width)
        step = together * max(1, PIECE_BYTES // (together * width * 4))
        counts = in_blocks(torch.ones(1, width), self.block)
        pieces = (self.source.read(begin, min(begin + step, rows)) for begin in range(0, rows, step))
        table = _table((part for piece in pieces for part in torch.split(piece, together)), counts, self.bits)
        found = in_rows(
            rows, together, lambda begin, end: _codes(self.source.read(begin, end), counts, table, self.bits)
        )
        return {**found, "table": table}


def _scales(blocks: torch.Tensor) -> torch.Tensor:
    """The value of largest magnitude of each block, [N,blocks,1]; 1 where all are zero."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def _table(parts: Iterable[torch.Tensor], counts: torch.Tensor, bits: int) -> torch.Tensor:
    """The table for the rows of all parts, float32 [2**bits]."""
    total = torch.zeros(_VALUES, dtype=torch.float64)
    for part in parts:
        blocks = in_blocks(part, counts.shape[-1])
        scales = _scales(blocks)
        number = (blocks / scales).bfloat16().view(torch.int16).long() & (_VALUES - 1)
        # an error of a value is one of the weight times its scale
        weight = (counts * scales.square()).double()
        total += torch.bincount(number.flatten(), weight.flatten(), minlength=_VALUES)
    found = total.nonzero().flatten()
    values, order = found.to(torch.int16).view(torch.bfloat16).float().sort()
    return cluster(values, total[found][order], 1 << bits).float()


def _codes(part: torch.Tensor, counts: torch.Tensor, table: torch.Tensor, bits: int) -> QuantizedWeight:
    """Rows as codes of a table; the scales are fitted to the codes once, and the codes then to the scales."""
    blocks = in_blocks(part, counts.shape[-1])
    scales = _scales(blocks)
    grid = TableGrid(scales, table)
    meant = table[grid.codes(blocks)]
    power = (counts * meant * meant).sum(-1, keepdim=True)
    fitted = (counts * meant * blocks).sum(-1, keepdim=True) / power.clamp(min=1e-30)
    scales = torch.where(fitted == 0, scales, fitted)
    codes = replace(grid, scale=scales).codes(blocks)
    return QuantizedWeight(pack(codes, bits), scales.squeeze(-1), None, None, bits, part.shape[1])
