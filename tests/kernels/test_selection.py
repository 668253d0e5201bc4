"""What the kernels choose when a prompt is read, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from memcompile.dialect import attention, attention_definition
from memcompile.dialect.cpu_attention import kernel_attention
from memcompile.dialect.selection import Kind, chosen_keys
from memcompile.kernels import KernelLibrary

PATTERNS = {
    "shape": (Kind.SHAPE, 64, 100, 0),
    "shape with a dense end": (Kind.SHAPE, 64, 100, 70),
    "blocks": (Kind.BLOCKS, 3, 1, 1),
    "blocks, none forced": (Kind.BLOCKS, 2, 0, 0),
    "antidiagonal": (Kind.ANTIDIAGONAL, 8, 700_000, 0),
    "vertical and slash": (Kind.VERTICAL_SLASH, 40, 101, 0),
    "many columns": (Kind.VERTICAL_SLASH, 150, 60, 0),
}
SIZES = ((300, 300), (200, 490), (64, 330), (17, 200))


def make(tokens: int, keys: int, width: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * tokens + keys)
    # a few keys matter much more than the others, as in a trained model
    k = torch.randn(2, 2, keys, width, generator=generator)
    k[:, :, ::37] *= 3
    q = torch.randn(2, 4, tokens, width, generator=generator)
    v = torch.randn(2, 2, keys, width, generator=generator)
    return [q, k, v]


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_kernels_choose_what_the_definition_chooses(
    library: KernelLibrary, name: str, block: int
) -> None:
    pattern = torch.tensor([PATTERNS[name]] * 3 + [(Kind.DENSE, 0, 0, 0)], dtype=torch.int32)
    for tokens, keys in SIZES:
        q, k, v = make(tokens, keys)
        positions = torch.arange(keys).unsqueeze(0)
        out = kernel_attention(q, k, v, scale=0.3, positions=positions, pattern=pattern, pattern_block=block)
        assert out is not None
        expected, _, _ = attention_definition(
            q.double(), k.double(), v.double(), None, None, positions, pattern=pattern,
            scale=0.3, pattern_block=block,
        )  # fmt: skip
        torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=0)
        dense, _, _ = attention_definition(
            q.double(), k.double(), v.double(), None, None, positions, scale=0.3
        )
        if (tokens, keys) == (200, 490) and block < 128:
            assert (dense - expected)[:, :3].abs().max() > 1e-3, "the choice left nothing out"
        torch.testing.assert_close(out[:, 3].double(), dense[:, 3], atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", PATTERNS)
def test_codes_and_bfloat16_choose_alike(library: KernelLibrary, name: str) -> None:
    pattern = torch.tensor([PATTERNS[name]] * 4, dtype=torch.int32)
    q, k, v = make(200, 490)
    scale = torch.full((2 * 32,), 0.1)
    codes = [torch.round(x / 0.1).clamp(-127, 127).to(torch.int8) for x in (k, v)]
    out = kernel_attention(
        q, *codes, scale=0.3, k_scale=scale, v_scale=scale, pattern=pattern, pattern_block=64
    )
    meant = [c.float() * 0.1 for c in codes]
    expected = kernel_attention(q, *meant, scale=0.3, pattern=pattern, pattern_block=64)
    assert out is not None
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    halves = [x.bfloat16() for x in (q, k, v)]
    rounded = [x.float() for x in halves]
    out = kernel_attention(*halves, scale=0.3, pattern=pattern, pattern_block=64)
    expected = kernel_attention(*rounded, scale=0.3, pattern=pattern, pattern_block=64)
    assert out is not None
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("name", PATTERNS)
def test_padded_rows_choose_as_they_would_alone(name: str) -> None:
    pattern = torch.tensor([PATTERNS[name]] * 4, dtype=torch.int32)
    q, k, v = make(300, 300)
    positions = torch.stack((torch.arange(300), torch.arange(300) - 90)).clamp(min=-1)
    together, _, _ = attention(q, k, v, positions=positions, pattern=pattern, pattern_block=32, scale=0.3)
    alone, _, _ = attention(
        *(x[1:, :, 90:] for x in (q, k, v)), positions=positions[1:, 90:], pattern=pattern,
        pattern_block=32, scale=0.3,
    )  # fmt: skip
    torch.testing.assert_close(together[1:, :, 90:], alone, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", PATTERNS)
def test_few_queries_and_short_prompts_look_at_everything(library: KernelLibrary, name: str) -> None:
    pattern = torch.tensor([PATTERNS[name]] * 4, dtype=torch.int32)
    for tokens, keys, begin in ((16, 300, 0), (1, 300, 0), (300, 300, 300)):
        q, k, v = make(tokens, keys)
        out = kernel_attention(q, k, v, scale=0.3, pattern=pattern, pattern_block=32, pattern_from=begin)
        expected = kernel_attention(q, k, v, scale=0.3)
        assert out is not None
        assert torch.equal(out, expected) if expected is not None else False


def test_every_block_sees_itself_and_nothing_is_listed_twice() -> None:
    q, k, _ = make(200, 490)
    for name, numbers in PATTERNS.items():
        pattern = torch.tensor([numbers] * 4)
        chosen = chosen_keys(q[0].double(), k[0].double(), pattern, block=32, scale=0.3)
        for t in range(200):
            assert chosen[:, t, 290 + t].all(), name


def test_more_columns_or_blocks_never_lose_a_key() -> None:
    q, k, _ = make(300, 300)
    for kind in (Kind.BLOCKS, Kind.VERTICAL_SLASH):
        before = torch.zeros(4, 300, 300, dtype=torch.bool)
        for budget in (1, 3, 5, 8) if kind == Kind.BLOCKS else (30, 60, 90, 140):
            pattern = torch.tensor([(kind, budget, 0 if kind == Kind.BLOCKS else 60, 0)] * 4)
            chosen = chosen_keys(q[0].double(), k[0].double(), pattern, block=32, scale=0.3)
            assert (chosen | ~before).all()
            before = chosen


def test_the_antidiagonal_sums_are_those_of_the_score_matrix() -> None:
    q, k, _ = make(64, 64)
    scores = q[0, 0] @ k[0, 0].T
    cells = scores.reshape(8, 8, 8, 8).permute(0, 2, 1, 3)  # [row cell, key cell, 8, 8]
    sums = cells.flip(2).diagonal(dim1=2, dim2=3).sum(-1)
    q_cells = q[0, 0].reshape(8, 8, 32).flip(1).flatten(1)
    torch.testing.assert_close(q_cells @ k[0, 0].reshape(8, 256).T, sums, atol=1e-4, rtol=0)


def test_a_pattern_that_makes_no_sense_is_refused(library: KernelLibrary) -> None:
    q, k, v = make(300, 300)
    for pattern in ((9, 0, 0, 0), (Kind.ANTIDIAGONAL, 7, 1, 0), (Kind.BLOCKS, -1, 0, 0)):
        with pytest.raises(ValueError, match="sizes or types"):
            kernel_attention(
                q, k, v, scale=0.3, pattern=torch.tensor([pattern] * 4, dtype=torch.int32), pattern_block=32
            )
