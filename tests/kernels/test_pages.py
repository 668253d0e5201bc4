"""One query over the pages it chooses: bounds, choice and attention against the definitions in float64."""

from __future__ import annotations

import pytest
import torch

from memcompile.dialect import attention, attention_definition, page_bounds
from memcompile.dialect.cache_codes import dequantize, quantize
from memcompile.dialect.cpu_attention import kernel_attention
from memcompile.dialect.pages import chosen_pages
from memcompile.kernels import KernelLibrary

# keys, page, pages to keep
CHOICES = ((300, 16, 4), (321, 16, 1), (640, 32, 3), (700, 64, 2), (1000, 16, 20))


def make(keys: int, width: int = 64, heads: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(keys * width)
    k = torch.randn(2, 2, keys, width, generator=generator)
    # a few keys matter much more than the others, as in a trained model
    k[:, :, ::41] *= 3
    q = torch.randn(2, heads, 1, width, generator=generator)
    return q, k, torch.randn(2, 2, keys, width, generator=generator)


def bounds_of(k: torch.Tensor, page: int) -> torch.Tensor:
    empty = k.new_zeros(*k.shape[:2], 0, 2 * k.shape[3])
    return page_bounds(k, empty, torch.arange(k.shape[2]).unsqueeze(0), page_tokens=page)


def meant(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page: int, keep: int, begin: int = 0
) -> torch.Tensor:
    """What attention over the chosen pages gives, in float64."""
    out, _, _ = attention_definition(
        q.double(), k.double(), v.double(), bounds=bounds_of(k.double(), page),
        positions=torch.arange(k.shape[2]).unsqueeze(0), scale=0.3, page_tokens=page, page_keep=keep,
        page_from=begin, causal=False,
    )  # fmt: skip
    return out


def test_bounds_are_the_extremes_of_every_page() -> None:
    _, k, _ = make(100)
    bounds = bounds_of(k, 16)
    assert bounds.shape == (2, 2, 7, 128)
    for page, keys in enumerate(torch.split(k, 16, dim=2)):
        assert torch.equal(bounds[:, :, page, :64], keys.amax(2))
        assert torch.equal(bounds[:, :, page, 64:], keys.amin(2))


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_bounds_grow_with_every_split_to_the_same(bits: int) -> None:
    _, k, _ = make(100, width=32)
    scale = torch.full((64,), 0.4) if bits else None
    stored = 2 * (16 if bits == 4 else 32)
    kind = {0: torch.float32, 8: torch.int8, 4: torch.uint8}[bits]
    empty = torch.zeros(2, 2, 0, stored, dtype=kind)
    positions = torch.arange(100).unsqueeze(0)
    whole = page_bounds(k, empty, positions, scale, page_tokens=16, bits=bits)
    for cuts in ((1, 17, 64, 65), (16, 32), tuple(range(1, 100))):
        grown, start = empty, 0
        for end in (*cuts, 100):
            grown = page_bounds(
                k[:, :, start:end], grown, positions[:, :end], scale, page_tokens=16, bits=bits
            )
            start = end
        assert torch.equal(grown, whole)


def test_empty_slots_are_in_no_page() -> None:
    _, k, _ = make(90)
    poisoned = torch.full((2, 2, 130, 64), float("nan"))
    valid = torch.ones(130, dtype=torch.bool)
    valid[20:50] = valid[100:110] = False
    poisoned[:, :, valid] = k
    positions = torch.full((1, 130), -1)
    positions[0, valid] = torch.arange(90)
    empty = k.new_zeros(2, 2, 0, 128)
    got = page_bounds(poisoned, empty, positions, page_tokens=16)
    assert torch.equal(got[:, :, :6], bounds_of(k, 16))
    q, _, v = make(90)
    spread = torch.full((2, 2, 130, 64), float("nan"))
    spread[:, :, valid] = v
    query = positions.clone()
    out, _, _ = attention(
        q, poisoned[:, :, -1:], spread[:, :, -1:], poisoned[:, :, :-1], spread[:, :, :-1], query, bounds=got,
        scale=0.3, page_tokens=16, page_keep=3,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), meant(q, k, v, 16, 3), atol=5e-6, rtol=0)


def test_no_key_of_a_page_is_above_its_bound() -> None:
    k = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 1.0]])
    bounds = torch.cat((k.amax(0), k.amin(0)))
    q = torch.tensor([[1.0, -1.0]])
    bound = q.clamp(min=0) @ bounds[:2] + q.clamp(max=0) @ bounds[2:]
    assert (bound.item(), (k @ q[0]).max().item()) == (5.0, 3.0)


def test_the_newest_page_is_chosen_and_then_the_best() -> None:
    k = torch.zeros(1, 80, 4)
    k[0, 17] = k[0, 65] = torch.tensor([9.0, 0, 0, 0])
    bounds = torch.cat([torch.cat((p.amax(1), p.amin(1)), 1) for p in torch.split(k, 16, 1)])[None]
    q = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    assert chosen_pages(q, bounds, 80, page_tokens=16, keep=2).tolist() == [[False, True, False, False, True]]
    # of equal bounds the first
    chosen = chosen_pages(q, bounds, 80, page_tokens=16, keep=3)
    assert chosen.tolist() == [[True, True, False, False, True]]
    assert chosen_pages(q, bounds, 80, page_tokens=16, keep=5).all()


@pytest.mark.parametrize(("width", "heads"), [(64, 6), (128, 2), (24, 4), (64, 40)])
def test_the_kernels_attend_to_what_the_definition_chooses(
    library: KernelLibrary, width: int, heads: int
) -> None:
    for keys, page, keep in CHOICES:
        q, k, v = make(keys, width, heads)
        expected = meant(q, k, v, page, keep)
        bounds = bounds_of(k, page)
        for threads in (1, 2):
            out = kernel_attention(
                q, k, v, bounds=bounds, page_tokens=page, page_keep=keep, scale=0.3, threads=threads
            )
            assert out is not None
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
        dense = meant(q, k, v, page, 10**6)
        assert (dense - expected).abs().max() > 1e-3, "the choice left nothing out"


def test_rows_of_different_lengths_choose_as_alone(library: KernelLibrary) -> None:
    q, k, v = make(500)
    used = torch.tensor([500, 77], dtype=torch.int32)
    bounds = bounds_of(k, 16)
    # a page that holds two keys only knows of these two
    bounds[1:, :, 4] = bounds_of(k[1:, :, :77], 16)[:, :, 4]
    k[1, :, 77:] = v[1, :, 77:] = float("nan")
    out = kernel_attention(
        q, k, v, bounds=bounds, page_tokens=16, page_keep=4, page_from=80, used=used, scale=0.3
    )
    assert out is not None
    torch.testing.assert_close(out[:1].double(), meant(q[:1], k[:1], v[:1], 16, 4), atol=5e-6, rtol=0)
    short = (x[1:, :, :77] for x in (k, v))
    torch.testing.assert_close(out[1:].double(), meant(q[1:], *short, 16, 100), atol=5e-6, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_choose_as_what_they_stand_for(library: KernelLibrary, bits: int) -> None:
    q, k, v = make(600)
    scale = torch.linspace(0.2, 0.6, 128) if bits == 4 else torch.linspace(0.02, 0.05, 128)
    codes = [quantize(x, scale, bits) for x in (k, v)]
    values = [dequantize(x, scale, bits, 64) for x in codes]
    stored = torch.zeros(2, 2, 0, 2 * codes[0].shape[3], dtype=codes[0].dtype)
    bounds = page_bounds(k, stored, torch.arange(600).unsqueeze(0), scale, page_tokens=16, bits=bits)
    out = kernel_attention(
        q, *codes, bounds=bounds, page_tokens=16, page_keep=5, k_scale=scale, v_scale=scale, scale=0.3
    )
    assert out is not None
    torch.testing.assert_close(out.double(), meant(q, *values, 16, 5), atol=1e-5, rtol=0)


def test_bfloat16_chooses_by_its_own_bounds(library: KernelLibrary) -> None:
    q, k, v = (x.bfloat16() for x in make(600))
    out = kernel_attention(q, k, v, bounds=bounds_of(k, 16), page_tokens=16, page_keep=5, scale=0.3)
    assert out is not None
    torch.testing.assert_close(out.double(), meant(q, k, v, 16, 5), atol=3e-2, rtol=0)


def test_a_budget_of_every_page_and_a_short_row_are_dense(library: KernelLibrary) -> None:
    q, k, v = make(300)
    dense = kernel_attention(q, k, v, scale=0.3)
    for keep, begin in ((19, 0), (1, 300)):
        out = kernel_attention(
            q, k, v, bounds=bounds_of(k, 16), page_tokens=16, page_keep=keep, page_from=begin, scale=0.3
        )
        assert out is not None
        assert dense is not None
        assert torch.equal(out, dense)


def test_pages_of_other_sizes_are_refused(library: KernelLibrary) -> None:
    q, k, v = make(300)
    for page, keep in ((8, 1), (17, 1), (16, 0)):
        with pytest.raises(ValueError, match="sizes or types"):
            kernel_attention(q, k, v, bounds=bounds_of(k, page), page_tokens=page, page_keep=keep, scale=0.3)
