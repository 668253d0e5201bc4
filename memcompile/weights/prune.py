"""Which weights of a matrix stay: masks by a score, and the sparsity at which predictions begin to break."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mask_of_weights(score: torch.Tensor, sparsity: float, *, by_row: bool) -> torch.Tensor:
    """Keep the best of a score [N,K]: `sparsity` of the matrix, or of each row, goes. Gives bool [N,K]."""
    flat = score if by_row else score.reshape(1, -1)
    dropped = round(sparsity * flat.shape[1])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep.scatter_(1, flat.topk(dropped, dim=1, largest=False).indices, False)
    return keep.reshape(score.shape)


def mask_n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the best n of every m neighbours along K, bool [N,K]; of a shorter rest the best n too."""
    rows, width = score.shape
    groups = -(-width // m)
    padded = torch.nn.functional.pad(score, (0, groups * m - width), value=-torch.inf).reshape(
        rows, groups, m
    )
    keep = torch.zeros_like(padded, dtype=torch.bool)
    keep.scatter_(2, padded.topk(n, dim=2).indices, True)
    return keep.reshape(rows, -1)[:, :width]


def mask_of_blocks(score: torch.Tensor, sparsity: float, block: int) -> torch.Tensor:
    """Keep the blocks [block,block] with the largest sums of a score [N,K]; bool [N,K]."""
    rows, width = score.shape
    down, across = -(-rows // block), -(-width // block)
    padded = torch.nn.functional.pad(score, (0, across * block - width, 0, down * block - rows))
    sums = padded.reshape(down, block, across, block).sum((1, 3))
    keep = mask_of_weights(sums, sparsity, by_row=False)
    return keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :width]


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask [N,K] as bits, uint8 [N,ceil(K/8)]."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).reshape(len(mask), -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def unpack_mask(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The mask [N,width] that `pack_mask` packed."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().flatten(1)[:, :width]


def knee(sparsities: Sequence[float], losses: Sequence[float]) -> float:
    """The sparsity at which a rising loss leaves its flat part.

    It is the point farthest below the chord from the first to the last, both axes scaled to 1: the sharp drop
    that Jaiswal et al. 2023, "The Emergence of Essential Sparsity", arXiv:2306.03805, find in one-shot
    magnitude pruning. A loss that does not rise has its knee at the end.
    """
    begin, end = sparsities[0], sparsities[-1]
    low, high = losses[0], losses[-1]
    if high <= low:
        return end
    below = [
        (sparsity - begin) / (end - begin) - (loss - low) / (high - low)
        for sparsity, loss in zip(sparsities, losses, strict=True)
    ]
    return sparsities[below.index(max(below))]
