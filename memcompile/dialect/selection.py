"""Which keys each head looks at when a prompt is read: the meaning of `memcompile::attention`'s `pattern`.

A head's pattern is four whole numbers, a kind and what it needs:

    dense            (0, -, -, -)
    shape            (1, first tokens, local tokens, dense queries at the call's end)
    blocks           (2, blocks to keep, first blocks, recent blocks)
    antidiagonal     (3, stride in tokens, mass to keep in millionths, -)
    vertical-slash   (4, columns, diagonals, -)

Keys and queries are counted within their row, empty slots left out, in blocks of `block` tokens; queries from
the call's first one on. A block of queries always sees the blocks that it lies in itself.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import torch

# calls with at most so many queries are decoding: they look at everything
FEW_QUERIES: Final = 16
LAST_QUERIES: Final = 64
FORCED_COLUMNS: Final = 30
FORCED_DIAGONALS: Final = 100
LEAST_DIAGONALS: Final = 50


class Kind(IntEnum):
    """The first number of a head's pattern."""

    DENSE = 0
    SHAPE = 1
    BLOCKS = 2
    ANTIDIAGONAL = 3
    VERTICAL_SLASH = 4


def chosen_keys(
    q_HTD: torch.Tensor, k_GSD: torch.Tensor, pattern_H4: torch.Tensor, *, block: int, scale: float
) -> torch.Tensor:
    """The keys that each query may look at, bool [H,T,S], for one row whose queries are its last T tokens.

    The choice does not know of causality between single tokens: the caller's own mask goes on top.
    """
    heads, tokens, _ = q_HTD.shape
    groups, keys, _ = k_GSD.shape
    chosen = torch.ones(heads, tokens, keys, dtype=torch.bool, device=q_HTD.device)
    for head, (kind, *numbers) in enumerate(pattern_H4.tolist()):
        if covers(kind, numbers, keys, block):
            continue
        grid = _Grid(q_HTD[head], k_GSD[head // (heads // groups)], block, scale)
        chosen[head] = _RULES[Kind(kind)](grid, *numbers)
    return chosen


def covers(kind: int, numbers: list[int], keys: int, block: int) -> bool:
    """Whether a head's budget reaches every key of the row, so that there is nothing to choose."""
    a, b, c = numbers
    return {
        Kind.DENSE: True,
        Kind.SHAPE: a + b >= keys or c >= keys,
        Kind.BLOCKS: a * block >= keys,
        Kind.ANTIDIAGONAL: b > 1_000_000,
        Kind.VERTICAL_SLASH: a >= keys or b >= keys,
    }[Kind(kind)]


class _Grid:
    """One head's queries [T,D] and keys [S,D] in blocks."""

    def __init__(self, q_TD: torch.Tensor, k_SD: torch.Tensor, block: int, scale: float) -> None:
        self.q, self.k, self.block, self.scale = q_TD, k_SD, block, scale
        self.tokens, self.keys = len(q_TD), len(k_SD)
        self.first = self.keys - self.tokens
        self.down, self.across = -(-self.tokens // block), -(-self.keys // block)
        rows = torch.arange(self.down, device=q_TD.device)
        self.first_own = self.first + rows * block
        self.last_own = self.first + torch.clamp((rows + 1) * block, max=self.tokens) - 1
        self.columns = torch.arange(self.across, device=q_TD.device)
        last_block = (self.last_own // block).unsqueeze(1)
        self.seen = self.columns <= last_block  # [down, across]: some key is not in the future
        self.own = self.seen & (self.columns >= (self.first_own // block).unsqueeze(1))

    def tokens_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """A choice of blocks [down, across] as a choice of keys [T,S]."""
        wide = blocks.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return wide[: self.tokens, : self.keys]

    def block_means(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of each block of rows, the last one of what it has."""
        return torch.stack([part.mean(0) for part in torch.split(x, self.block)])


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` largest scores; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count]


def _shape(grid: _Grid, first_tokens: int, local_tokens: int, tail_queries: int) -> torch.Tensor:
    begin = grid.columns * grid.block
    near = begin + grid.block - 1 > (grid.first_own - local_tokens).unsqueeze(1)
    ends = (torch.arange(grid.down, device=begin.device) + 1) * grid.block
    whole = (ends > grid.tokens - tail_queries).unsqueeze(1)
    return grid.tokens_of((grid.seen & ((begin < first_tokens) | near | whole)) | grid.own)


def _blocks(grid: _Grid, keep: int, first_blocks: int, recent_blocks: int) -> torch.Tensor:
    scores = grid.block_means(grid.q) @ grid.block_means(grid.k).T
    chosen = torch.zeros_like(grid.own)
    for i in range(grid.down):
        seen = int(grid.seen[i].sum())
        forced = grid.own[i] | (grid.columns < first_blocks) | (grid.columns >= seen - recent_blocks)
        forced &= grid.seen[i]
        rest = scores[i].masked_fill(forced | ~grid.seen[i], float("-inf"))
        left = min(max(0, keep - int(forced.sum())), int((~forced & grid.seen[i]).sum()))
        chosen[i] = forced
        chosen[i, _largest(rest, left)] = True
    return grid.tokens_of(chosen)


def _antidiagonal(grid: _Grid, stride: int, millionths: int, _: int) -> torch.Tensor:
    def cells(x: torch.Tensor) -> torch.Tensor:
        short = -len(x) % stride
        return torch.cat((x, x.new_zeros(short, x.shape[1]))).reshape(-1, stride, x.shape[1])

    q_cells, k_cells = cells(grid.q).flip(1).flatten(1), cells(grid.k).flatten(1)
    scores = q_cells @ k_cells.T * (grid.scale / stride)
    rows = torch.arange(len(q_cells), device=scores.device)
    own = grid.first + torch.clamp((rows + 1) * stride, max=grid.tokens) - 1
    future = torch.arange(len(k_cells), device=scores.device) * stride > own.unsqueeze(1)
    mass = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
    per_block = grid.block // stride
    mass = torch.stack([part.sum(0) for part in torch.split(mass, per_block, 0)])
    mass = torch.stack([part.sum(1) for part in torch.split(mass, per_block, 1)], dim=1)
    mass = mass.masked_fill(~grid.seen, 0.0)
    chosen = grid.own | (grid.columns == 0)
    for i in range(grid.down):
        needed = millionths * 1e-6 * mass[i].sum()
        held = mass[i][chosen[i]].sum()
        for j in mass[i].masked_fill(chosen[i] | ~grid.seen[i], -1.0).argsort(descending=True, stable=True):
            if held >= needed or not grid.seen[i, j] or chosen[i, j]:
                break
            chosen[i, j] = True
            held = held + mass[i, j]
    return grid.tokens_of(chosen)


def _vertical_slash(grid: _Grid, columns: int, diagonals: int, _: int) -> torch.Tensor:
    last = min(LAST_QUERIES, grid.tokens)
    own = torch.arange(grid.keys - last, grid.keys, device=grid.q.device).unsqueeze(1)
    places = torch.arange(grid.keys, device=grid.q.device)
    distance = own - places  # [last, S]
    scores = (grid.q[-last:] @ grid.k.T * grid.scale).masked_fill(distance < 0, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    vertical = weights.sum(0)
    slash = torch.zeros_like(vertical).scatter_add_(0, distance.clamp(min=0).flatten(), weights.flatten())
    vertical[:FORCED_COLUMNS] = float("inf")
    slash[:FORCED_DIAGONALS] = float("inf")
    kept_columns = _largest(vertical, max(columns, FORCED_COLUMNS))
    kept_diagonals = _largest(slash, max(diagonals, LEAST_DIAGONALS))
    blocks = grid.own.clone()
    for i in range(grid.down):
        end = grid.last_own[i] - kept_diagonals
        begin = (grid.first_own[i] - kept_diagonals).clamp(min=0)[end >= 0] // grid.block
        # a diagonal covers the blocks from `begin` to `end`: count where they open and close
        edges = torch.zeros(grid.across + 1, dtype=torch.int64, device=end.device)
        edges.scatter_add_(0, begin, torch.ones_like(begin))
        beyond = end[end >= 0] // grid.block + 1
        edges.scatter_add_(0, beyond, -torch.ones_like(beyond))
        blocks[i] |= edges.cumsum(0)[:-1] > 0
    chosen = grid.tokens_of(blocks).clone()
    chosen[:, kept_columns] = True
    return chosen


_RULES = {
    Kind.SHAPE: _shape,
    Kind.BLOCKS: _blocks,
    Kind.ANTIDIAGONAL: _antidiagonal,
    Kind.VERTICAL_SLASH: _vertical_slash,
}


def select_for_rows(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    positions_BS: torch.Tensor,
    pattern_H4: torch.Tensor,
    *,
    block: int,
    begin: int,
    scale: float,
) -> torch.Tensor:
    """The choice for every row of a batch, bool [B,H,T,S]; positions below 0 are empty and left out.

    A row with at most `begin` keys, or at most `FEW_QUERIES` queries, looks at everything.
    """
    batch, heads, tokens, _ = q_BHTD.shape
    keys = k_BGSD.shape[2]
    chosen = torch.ones(batch, heads, tokens, keys, dtype=torch.bool, device=q_BHTD.device)
    for row in range(batch):
        valid = positions_BS[row if positions_BS.shape[0] > 1 else 0] >= 0
        places = valid.nonzero().flatten()
        queries = places[places >= keys - tokens] - (keys - tokens)
        if len(queries) <= FEW_QUERIES or len(places) <= begin:
            continue
        picked = chosen_keys(
            q_BHTD[row][:, queries], k_BGSD[row][:, places], pattern_H4, block=block, scale=scale
        )
        whole = chosen[row].clone()
        whole[:, queries.unsqueeze(1), places] = picked
        chosen[row] = whole
    return chosen
