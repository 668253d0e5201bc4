"""The attention kernels against the definition in float64: every instruction set, storage and size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.dialect.attention import attention_definition
from memcompile.dialect.cache_codes import dequantize, quantize
from memcompile.dialect.cpu_attention import kernel_attention
from memcompile.kernels import KernelLibrary

EDGES = (1, 63, 64, 65, 200)
# one rounding of the inputs' own type
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": 33},
    "window both ways": {"window": 33, "causal": False},
    "sinks": {"window": 33, "sinks": 5},
    "strided": {"window": 9, "sinks": 1, "block": 8, "stride": 3},
    "softcap": {"softcap": 1.5},
}


def make(
    tokens: int,
    keys: int,
    heads: int = 4,
    groups: int = 2,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * tokens + keys)
    sizes = ((heads, tokens), (groups, keys), (groups, keys))
    return [torch.randn(2, h, t, width, generator=generator).to(dtype) for h, t in sizes]


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **attributes: Any) -> torch.Tensor:
    attributes = {"scale": q.shape[-1] ** -0.5, **attributes}
    return attention_definition(q.double(), k.double(), v.double(), **attributes)[0]


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **attributes: Any) -> torch.Tensor:
    attributes = {"scale": q.shape[-1] ** -0.5, **attributes}
    out = kernel_attention(q, k, v, **attributes)
    assert out is not None
    return out


def close(got: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", EDGES)
def test_prefill_agrees_with_the_definition(library: KernelLibrary, tokens: int, mask: str) -> None:
    for dtype, atol in TOLERANCE.items():
        q, k, v = make(tokens, tokens, dtype=dtype)
        close(run(q, k, v, **MASKS[mask]), definition(q, k, v, **MASKS[mask]), atol)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
def test_every_head_width(library: KernelLibrary, width: int, groups: int) -> None:
    for dtype, atol in TOLERANCE.items():
        for tokens, keys in ((65, 65), (1, 300)):
            q, k, v = make(tokens, keys, groups=groups, width=width, dtype=dtype)
            positions = torch.arange(keys).unsqueeze(0)
            close(run(q, k, v, positions=positions), definition(q, k, v, positions=positions), atol)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_few_queries_over_a_long_cache(library: KernelLibrary, tokens: int, mask: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # more than the scores that are kept at a time, and an odd number
        q, k, v = make(tokens, 1301, dtype=dtype)
        positions = torch.arange(1301).unsqueeze(0).expand(2, -1)
        expected = definition(q, k, v, positions=positions, **MASKS[mask])
        for splits in (0, 1, 3):
            for threads in (1, 2):
                out = run(q, k, v, positions=positions, splits=splits, threads=threads, **MASKS[mask])
                close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 65])
def test_empty_slots_may_hold_nan(library: KernelLibrary, tokens: int) -> None:
    for dtype, atol in TOLERANCE.items():
        q, k, v = make(tokens, 200, dtype=dtype)
        positions = torch.arange(200).unsqueeze(0).repeat(2, 1)
        # holes: at the start of a tile, inside one, and in the second row a shorter sequence
        positions[0, :3] = positions[0, 70:90] = positions[1, 100 : 200 - tokens] = -1
        for x in (k, v):
            x.masked_fill_((positions < 0)[:, None, :, None], float("nan"))
        clean = [x.nan_to_num() for x in (k, v)]
        close(run(q, k, v, positions=positions), definition(q, *clean, positions=positions), atol)


def test_a_query_that_sees_nothing_gives_zero(library: KernelLibrary) -> None:
    for tokens in (1, 70):
        q, k, v = make(tokens, tokens)
        positions = torch.full((2, tokens), -1)
        lse = torch.empty(2, 4, tokens)
        assert run(q, k, v, positions=positions, lse=lse).abs().max() == 0
        assert (lse == float("-inf")).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_codes_are_read_as_what_they_stand_for(library: KernelLibrary, tokens: int, bits: int) -> None:
    for width in (32, 64, 96):
        q, k, v = make(tokens, 200, width=width)
        scales = [torch.rand(2 * width) * 0.2 + 0.02 for _ in range(2)]
        codes = [quantize(x, scale, bits) for x, scale in zip((k, v), scales, strict=True)]
        meant = [dequantize(c, s.double(), bits, width) for c, s in zip(codes, scales, strict=True)]
        expected = definition(q, *meant, positions=torch.arange(200).unsqueeze(0), scale=0.2)
        out = run(
            q,
            *codes,
            positions=torch.arange(200).unsqueeze(0),
            k_scale=scales[0],
            v_scale=scales[1],
            scale=0.2,
        )
        close(out, expected, 1e-5)


@pytest.mark.parametrize("tokens", [1, 65, 200])
def test_products_in_bfloat16_over_any_storage(library: KernelLibrary, tokens: int) -> None:
    for width in (32, 48, 64):
        q, k, v = make(tokens, 200, width=width)
        positions = torch.arange(200).unsqueeze(0).repeat(2, 1)
        positions[0, 70:90] = -1
        scale = torch.rand(2 * width) * 0.2 + 0.02
        codes = [quantize(x, scale, 8) for x in (k, v)]
        token_scales = [torch.rand(2, 2, 200) + 0.5 for _ in range(2)]
        meant = [
            dequantize(c, scale.double(), 8, width) * s[..., None]
            for c, s in zip(codes, token_scales, strict=True)
        ]
        names = ("k_scale", "v_scale", "k_token_scale", "v_token_scale")
        coded = dict(zip(names, (scale, scale, *token_scales), strict=True))
        mask = {"positions": positions, "window": 90, "sinks": 3}
        for stored, stands_for, scales in (((k, v), (k, v), {}), (codes, meant, coded)):
            expected = definition(q, *stands_for, **mask)
            for key_tile in (0, 16):
                out = run(q, *stored, products="bfloat16", key_tile=key_tile, **mask, **scales)
                close(out, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("tokens", [1, 65])
def test_scales_may_belong_to_tokens(library: KernelLibrary, tokens: int) -> None:
    q, k, v = make(tokens, 200)
    scales = [x.abs().amax(-1) / 127 for x in (k, v)]
    codes = [torch.round(x / s[..., None]).to(torch.int8) for x, s in zip((k, v), scales, strict=True)]
    meant = [c * s[..., None] for c, s in zip(codes, scales, strict=True)]
    positions = torch.arange(200).unsqueeze(0)
    out = run(q, *codes, positions=positions, k_token_scale=scales[0], v_token_scale=scales[1])
    close(out, definition(q, *meant, positions=positions), 1e-5)


@pytest.mark.parametrize("block_tokens", [32, 64, 128])
def test_blocks_that_are_not_chosen_are_not_seen(library: KernelLibrary, block_tokens: int) -> None:
    for tokens, keys in ((200, 200), (130, 330), (1, 200)):
        for dtype, atol in TOLERANCE.items():
            q, k, v = make(tokens, keys, dtype=dtype)
            sizes = (-(-tokens // block_tokens), -(-keys // block_tokens))
            blocks = torch.rand(2, 4, *sizes) < 0.4
            mask = blocks.repeat_interleave(block_tokens, 2).repeat_interleave(block_tokens, 3)
            mask = mask[:, :, :tokens, :keys]
            positions = torch.arange(keys).unsqueeze(0)
            out = run(q, k, v, positions=positions, blocks=blocks, block_tokens=block_tokens)
            close(out, definition(q, k, v, positions=positions, mask=mask), atol)


def test_skipped_blocks_are_not_read(library: KernelLibrary) -> None:
    q, k, v = make(128, 128)
    blocks = torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8).expand(2, 4, 2, 2).contiguous()
    expected = run(q, k, v, blocks=blocks, block_tokens=64)
    k[:, :, :64], v[:, :, :64] = float("nan"), float("nan")
    assert torch.equal(run(q, k, v, blocks=blocks, block_tokens=64)[:, :, 64:], expected[:, :, 64:])


@pytest.mark.parametrize("count", [1, 16, 63, 300])
def test_decoding_over_chosen_slots(library: KernelLibrary, count: int) -> None:
    q, k, v = make(1, 700)
    chosen = torch.stack([torch.randperm(700)[:count] for _ in range(4)]).reshape(2, 2, count)
    gathered = [x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v)]
    slots = torch.cat((chosen, torch.full((2, 2, 5), -1)), dim=2).to(torch.int32)
    out = run(q, k, v, slots=slots, causal=False)
    close(out, definition(q, *gathered, causal=False), 5e-6)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 70), keys=st.integers(1, 300), parts=st.integers(1, 299), softcap=st.booleans())
def test_parts_merge_by_their_log_sum_exp(tokens: int, keys: int, parts: int, softcap: bool) -> None:
    q, k, v = make(tokens, keys)
    cut = min(parts, keys)
    attributes: dict[str, Any] = {"causal": False, "softcap": 2.0 if softcap else 0.0}
    whole, halves, sums = torch.empty(2, 4, tokens), [], []
    expected = run(q, k, v, lse=whole, **attributes)
    for part in (slice(0, cut), slice(cut, keys)):
        if part.start == part.stop:
            continue
        sums.append(torch.empty(2, 4, tokens))
        halves.append(run(q, k[:, :, part], v[:, :, part], lse=sums[-1], **attributes))
    joined = torch.stack(sums).logsumexp(0)
    merged = sum(x * (s - joined).exp()[..., None] for x, s in zip(halves, sums, strict=True))
    assert isinstance(merged, torch.Tensor)
    torch.testing.assert_close(joined, whole, atol=5e-6, rtol=0)
    torch.testing.assert_close(merged, expected, atol=5e-6, rtol=0)


def test_rows_of_different_lengths(library: KernelLibrary) -> None:
    q, k, v = make(5, 90)
    used = torch.tensor([90, 40])
    out = run(q, k, v, used=used)
    for row, length in enumerate(used.tolist()):
        alone = [x[row : row + 1] for x in (q, k[:, :, :length], v[:, :, :length])]
        positions = torch.arange(length).unsqueeze(0)
        close(out[row : row + 1], definition(*alone, positions=positions), 5e-6)


def test_the_result_does_not_depend_on_the_threads(library: KernelLibrary) -> None:
    q, k, v = make(200, 200)
    assert torch.equal(run(q, k, v, threads=1), run(q, k, v, threads=2))


@pytest.mark.parametrize("key_tile", [16, 32, 64, 128])
def test_every_tile_size_gives_the_same(library: KernelLibrary, key_tile: int) -> None:
    q, k, v = make(100, 300)
    positions = torch.arange(300).unsqueeze(0)
    out = run(q, k, v, positions=positions, key_tile=key_tile)
    close(out, definition(q, k, v, positions=positions), 5e-6)


def test_sizes_that_no_kernel_takes_are_refused(library: KernelLibrary) -> None:
    q, k, v = make(4, 4)
    with pytest.raises(ValueError, match="sizes or types"):
        run(q, k, v, key_tile=48)
    with pytest.raises(ValueError, match="sizes or types"):
        run(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match="at most 16 queries"):
        run(*make(20, 40), slots=torch.zeros(2, 2, 3, dtype=torch.int32))
    assert kernel_attention(q.double(), k.double(), v.double(), scale=1.0) is None
