"""`memcompile::page_bounds`: what each page of cached keys lies between, so that decoding can choose pages.

A page is `page_tokens` keys of a row, counted without empty slots. Its bounds are the largest and the
smallest value of every channel; for any query q no key k of the page has a product q.k above

    bound(q, page) = sum over channels c of max(q_c * largest_c, q_c * smallest_c)

(Tang et al. 2024, Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv:2406.10774).
"""

from __future__ import annotations

import torch

from memcompile.dialect.cache_codes import code_dtype, code_width, dequantize, quantize
from memcompile.dialect.op import Cost, DialectOp, register


def page_count(slots: int, page_tokens: int) -> int:
    """Pages of so many slots, the last one perhaps not full."""
    return (slots + page_tokens - 1) // page_tokens


def page_bounds_definition(
    k: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    *,
    page_tokens: int,
    bits: int = 0,
) -> torch.Tensor:
    """The bounds [B,G,pages,2W] after the keys `k` [B,G,T,D] were appended to a cache.

    past: the bounds before, as they are stored: like a row of keys, the largest values and then the smallest
    (W: stored width of a key). positions: int64 [B or 1,P+T] of all keys, -1: an empty slot.
    With `bits` the bounds are those of the codes. Pages that hold nothing yet are zeros.
    """
    batch, groups, new, width = k.shape
    slots = positions.shape[1]
    valid = (positions >= 0).expand(batch, slots)
    before = valid[:, : slots - new].sum(dim=1)
    pages = page_count(slots, page_tokens)
    by = torch.ones(groups * width, device=k.device) if bits else None
    keys = k
    if bits and k_scale is not None and by is not None:
        # codes as numbers, so that the larger of two is the larger code
        keys = dequantize(quantize(k, k_scale, bits), by, bits, width)
    work = keys.dtype
    largest = torch.full((batch, groups, pages, width), float("-inf"), dtype=work, device=k.device)
    smallest = -largest
    if past.shape[2]:
        half = past.shape[3] // 2
        old_largest, old_smallest = (
            dequantize(part, by, bits, width) if by is not None else part
            for part in (past[..., :half], past[..., half:])
        )
        old = min(past.shape[2], pages)
        places = torch.arange(old, device=k.device) * page_tokens
        held = (places < before.unsqueeze(1)).reshape(batch, 1, old, 1)
        largest[:, :, :old] = torch.where(held, old_largest[:, :, :old], largest[:, :, :old])
        smallest[:, :, :old] = torch.where(held, old_smallest[:, :, :old], smallest[:, :, :old])
    appended = valid[:, slots - new :]
    rank = before.unsqueeze(1) + appended.cumsum(dim=1) - 1
    # an empty slot is in no page: it goes to one past the end, which is cut off
    page = torch.where(appended, rank // page_tokens, pages)
    index = page.reshape(batch, 1, new, 1).expand(batch, groups, new, width)
    spare = largest.new_zeros(batch, groups, 1, width)
    largest = torch.cat((largest, spare), 2).scatter_reduce(2, index, keys, "amax")[:, :, :pages]
    smallest = torch.cat((smallest, spare), 2).scatter_reduce(2, index, keys, "amin")[:, :, :pages]
    filled = largest >= smallest
    bounds = [torch.where(filled, x, 0.0).to(work) for x in (largest, smallest)]
    if by is not None:
        bounds = [quantize(x, by, bits) for x in bounds]
    return torch.cat(bounds, dim=3)


@torch.library.custom_op("memcompile::page_bounds", mutates_args=())
def page_bounds(
    k: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    *,
    page_tokens: int,
    bits: int = 0,
) -> torch.Tensor:
    """Bounds of the pages of keys after an append, [B,G,pages,2W]; see `page_bounds_definition`."""
    return page_bounds_definition(k, past, positions, k_scale, page_tokens=page_tokens, bits=bits)


@page_bounds.register_fake
def _(
    k: torch.Tensor,
    past: torch.Tensor,
    positions: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    *,
    page_tokens: int,
    bits: int = 0,
) -> torch.Tensor:
    batch, groups, _, width = k.shape
    pages = page_count(positions.shape[1], page_tokens)
    stored = 2 * code_width(bits, width)
    return k.new_empty((batch, groups, pages, stored), dtype=code_dtype(bits, k.dtype))


def chosen_pages(
    q_HD: torch.Tensor, bounds_GN2D: torch.Tensor, keys: int, *, page_tokens: int, keep: int
) -> torch.Tensor:
    """The pages that each key/value head looks at for one query, bool [G,N], N the pages of `keys` keys.

    The page of the newest keys is always among the `keep`; the others are those with the largest bound for
    any query head of the group, of equal ones the first. bounds: as numbers, not as codes.
    """
    heads, width = q_HD.shape
    groups, pages = bounds_GN2D.shape[0], page_count(keys, page_tokens)
    if keep >= pages:
        return torch.ones(groups, pages, dtype=torch.bool, device=q_HD.device)
    largest, smallest = bounds_GN2D[:, :pages, :width], bounds_GN2D[:, :pages, width:]
    q_GRD = q_HD.reshape(groups, heads // groups, width)
    bound = torch.einsum("grd,gnd->grn", q_GRD.clamp(min=0), largest)
    bound = bound + torch.einsum("grd,gnd->grn", q_GRD.clamp(max=0), smallest)
    score = bound.amax(dim=1)
    score[:, pages - 1] = float("inf")
    best = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)


def page_keys(
    q_BHTD: torch.Tensor,
    bounds: torch.Tensor,
    positions_BS: torch.Tensor,
    k_scale: torch.Tensor | None,
    *,
    page_tokens: int,
    keep: int,
    begin: int,
    bits: int,
) -> torch.Tensor | None:
    """The keys that a single query of every row may look at, bool [B,H,1,S]; None: all of them.

    Only calls of one token choose, and only in rows with more than `begin` keys.
    """
    batch, heads, tokens, width = q_BHTD.shape
    groups, slots = bounds.shape[1], positions_BS.shape[1]
    if tokens != 1:
        return None
    wide = bounds.to(q_BHTD.dtype)
    if bits and k_scale is not None:
        half = bounds.shape[3] // 2
        wide = torch.cat(
            [dequantize(x, k_scale, bits, width) for x in (bounds[..., :half], bounds[..., half:])], dim=3
        ).to(q_BHTD.dtype)
    chosen = torch.ones(batch, heads, 1, slots, dtype=torch.bool, device=q_BHTD.device)
    for row in range(batch):
        valid = positions_BS[row if positions_BS.shape[0] > 1 else 0] >= 0
        places = valid.nonzero().flatten()
        if len(places) <= begin:
            continue
        pages = chosen_pages(q_BHTD[row, :, 0], wide[row], len(places), page_tokens=page_tokens, keep=keep)
        keys = pages.repeat_interleave(page_tokens, dim=1)[:, : len(places)]
        chosen[row, :, 0, places] = keys.repeat_interleave(heads // groups, dim=0)
    return chosen


def page_bounds_cost(*, B: int, S: int, G: int, D: int, page_tokens: int, element_bytes: int = 4) -> Cost:
    """Cost of choosing among the pages of S keys: their bounds are read once."""
    size = B * G * page_count(S, page_tokens) * 2 * D * element_bytes
    return Cost(flops=2 * size // element_bytes, bytes_moved=size, state_bytes=size)


PAGE_BOUNDS = register(DialectOp("page_bounds", page_bounds_definition, page_bounds_cost, state=("bounds",)))
