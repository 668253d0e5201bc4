"""`memcompile::attention` against a judge that loops over positions one by one, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.dialect import DIALECT, attention, attention_definition
from memcompile.dialect.cache_codes import dequantize, quantize

EDGES = (1, 63, 64, 65, 200)


def make(
    tokens: int, heads: int = 4, groups: int = 2, width: int = 8, keys: int | None = None
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((heads, tokens), (groups, keys or tokens), (groups, keys or tokens))
    return [torch.randn(2, h, t, width, generator=generator, dtype=torch.float64) for h, t in sizes]


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, *, scale: float, causal: bool,
    window: int = 0, sinks: int = 0, block: int = 0, stride: int = 0, softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention by its textbook sum: one query, one head, one key at a time."""
    batch, heads, tokens, _ = q.shape
    repeat = heads // k.shape[1]
    out = torch.zeros_like(q)
    total = k.shape[2]
    for b in range(batch):
        for t in range(tokens):
            at = int(positions[b, total - tokens + t]) if causal else 0
            seen = []
            for s in range(total):
                p = int(positions[b, s])
                near = window == 0 or at - p < window or p < sinks
                near = near or (stride > 0 and (p // block) % stride == 0)
                if p >= 0 and at >= 0 and (not causal or p <= at) and near:
                    seen.append(s)
            for h in range(heads):
                if not seen:
                    continue
                scores = [float(q[b, h, t] @ k[b, h // repeat, s]) * scale for s in seen]
                if softcap:
                    scores = [softcap * math.tanh(x / softcap) for x in scores]
                top = max(scores)
                weights = [math.exp(x - top) for x in scores]
                out[b, h, t] = sum(
                    w / sum(weights) * v[b, h // repeat, s] for w, s in zip(weights, seen, strict=True)
                )
    return out


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"window": 4},
        {"window": 4, "sinks": 2},
        {"window": 4, "sinks": 1, "block": 3, "stride": 2},
    ],
    ids=["causal", "softcap", "window", "sinks", "stride"],
)
def test_definition_equals_the_textbook_sum(groups: int, options: dict[str, float]) -> None:
    q, k, v = make(13, groups=groups)
    positions = torch.arange(13).repeat(2, 1)
    positions[1, -3:] = -1
    got, _, _ = attention_definition(q, k, v, positions=positions, scale=0.3, **options)  # type: ignore[arg-type]
    want = one_by_one(q, k, v, positions, scale=0.3, causal=True, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tokens", EDGES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_kernel_agrees_with_the_definition_at_edges(tokens: int, causal: bool) -> None:
    q, k, v = make(tokens)
    want, _, _ = attention_definition(q, k, v, scale=0.3, causal=causal)
    got, _, _ = attention(q.float(), k.float(), v.float(), scale=0.3, causal=causal)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    window=st.integers(0, 7),
    sinks=st.integers(0, 3),
    bits=st.sampled_from([0, 8, 4]),
)
def test_any_split_equals_the_whole(lengths: list[int], window: int, sinks: int, bits: int) -> None:
    total = sum(lengths)
    q, k, v = make(total)
    scale = torch.full((16,), 4.0 / (127 if bits == 8 else 7), dtype=torch.float64)
    options = {"scale": 0.3, "window": window, "sinks": sinks, "bits": bits}
    scales = (scale, scale) if bits else (None, None)
    positions = torch.arange(total).repeat(2, 1)
    width = 4 if bits == 4 else 8
    storage = {0: torch.float64, 8: torch.int8, 4: torch.uint8}[bits]
    past_k = past_v = torch.zeros(2, 2, 0, width, dtype=storage)
    whole, whole_k, _ = attention(q, k, v, past_k, past_v, positions, None, *scales, **options)  # type: ignore[arg-type]
    pieces, start = [], 0
    for length in lengths:
        part = [x[:, :, start : start + length] for x in (q, k, v)]
        out, past_k, past_v = attention(
            *part,
            past_k,
            past_v,
            positions[:, : start + length],
            None,
            *scales,
            **options,  # type: ignore[arg-type]
        )
        pieces.append(out)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-12, rtol=0)
    assert torch.equal(past_k, whole_k)


def test_padding_may_hold_nan() -> None:
    q, k, v = make(6)
    positions = torch.tensor([[0, 1, 2, 3, -1, -1]]).repeat(2, 1)
    clean, _, _ = attention(q, k, v, positions=positions, scale=0.3)
    k[:, :, 4:] = float("nan")
    v[:, :, 4:] = float("nan")
    poisoned, _, _ = attention(q, k, v, positions=positions, scale=0.3)
    torch.testing.assert_close(poisoned[:, :, :4], clean[:, :, :4], atol=0, rtol=0)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    q, k, v = make(3)
    out, _, _ = attention(q, k, v, positions=torch.full((2, 3), -1), scale=0.3)
    assert torch.equal(out, torch.zeros_like(out))


def test_extreme_scores_stay_finite() -> None:
    q, k, v = make(5)
    out, _, _ = attention(
        (q * 1e4).float(), k.float(), v.float(), scale=1.0, positions=torch.arange(5).repeat(2, 1)
    )
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [7, 8])
def test_codes_are_the_nearest_representable_values(bits: int, width: int) -> None:
    x = torch.randn(1, 2, 5, width, generator=torch.Generator().manual_seed(0))
    limit = 127 if bits == 8 else 7
    scale = x.abs().amax(dim=(0, 2)).reshape(-1) / limit
    back = dequantize(quantize(x, scale, bits), scale, bits, width)
    assert float((back - x).abs().max()) <= float(scale.max()) / 2 + 1e-6


def test_gradients_equal_those_of_the_definition() -> None:
    def gradients(function: object) -> list[torch.Tensor]:
        tensors = [t.clone().requires_grad_() for t in make(7)]
        function(*tensors, scale=0.3)[0].square().sum().backward()  # type: ignore[operator]
        return [t.grad for t in tensors if t.grad is not None]

    for got, want in zip(gradients(attention), gradients(attention_definition), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_every_operator_has_its_parts() -> None:
    for name, op in DIALECT.items():
        assert op.schema.startswith(f"memcompile::{name}(")
        assert op.definition.__doc__, f"{name}: the definition says what it means"
        assert callable(op.cost)
