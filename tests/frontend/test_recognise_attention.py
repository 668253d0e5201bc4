"""Every spelling of attention is found; every look-alike is left alone, with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from memcompile.frontend.recognise import recognise
from memcompile.regions import (
    Causal,
    Mask,
    Padding,
    Runtime,
    SlidingWindow,
    Unmasked,
    argument,
    attention_regions,
)
from tests.frontend.graphs import HEADS, MODEL, WIDTH, Attend, causal, export, hidden, run_recognition

INF = float("inf")
SCALE = 0.3


def additive(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), -INF).triu(1)


def sdpa_causal_flag(q, k, v, m):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_additive_mask(q, k, v, m):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=additive(q.shape[2]))


def sdpa_boolean_mask(q, k, v, m):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=causal(q.shape[2]), scale=0.2)


def sdpa_unmasked(q, k, v, m):
    return functional.scaled_dot_product_attention(q, k, v)


def sdpa_grouped_flag(q, k, v, m):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa_repeat_interleave(q, k, v, m):
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def expand_heads(x):
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, 2, t, d).reshape(b, 2 * g, t, d)


def sdpa_expand(q, k, v, m):
    return functional.scaled_dot_product_attention(q, expand_heads(k), expand_heads(v), is_causal=True)


def sdpa_tiled_heads(q, k, v, m):
    # head h uses key head h % 2: not the grouping that the dialect has, so the heads stay expanded
    return functional.scaled_dot_product_attention(
        q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True
    )


def pre_scaled_query(q, k, v, m):
    return (q * SCALE @ k.transpose(-1, -2)).masked_fill(~causal(q.shape[2]), -INF).softmax(-1) @ v


def both_operands_scaled(q, k, v, m):
    root = WIDTH**-0.25
    return ((q * root) @ (k * root).mT + additive(q.shape[2])).softmax(-1) @ v


def post_scaled_scores(q, k, v, m):
    return (torch.matmul(q, k.transpose(2, 3)) * SCALE + additive(q.shape[2])).softmax(dim=-1) @ v


def divided_scores(q, k, v, m):
    return (q @ k.mT / math.sqrt(WIDTH) + additive(q.shape[2])).softmax(-1) @ v


def divided_by_a_tensor(q, k, v, m):
    return (q @ k.mT / torch.tensor(8.0).sqrt() + additive(q.shape[2])).softmax(-1) @ v


def einsum(q, k, v, m):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * SCALE
    return torch.einsum("bhts,bhsd->bhtd", scores.masked_fill(~causal(q.shape[2]), -1e9).softmax(-1), v)


def einsum_token_major(q, k, v, m):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("...thd,...shd->...hts", q, k) * SCALE
    return torch.einsum("bhts,bshd->bthd", (scores + additive(scores.shape[-1])).softmax(-1), v).transpose(
        1, 2
    )


def grouped_einsum(q, k, v, m):
    b, h, t, d = q.shape
    q = q.reshape(b, 2, 2, t, d)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * SCALE + additive(t)
    return torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), v).reshape(b, h, t, d)


def grouped_matmul(q, k, v, m):
    b, h, t, d = q.shape
    scores = q.reshape(b, 2, 2, t, d) @ k.unsqueeze(2).mT * SCALE + additive(t)
    return (scores.softmax(-1) @ v.unsqueeze(2)).reshape(b, h, t, d)


def batched_bmm(q, k, v, m):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE + additive(t)).softmax(-1), v).view(b, h, t, d)


def baddbmm(q, k, v, m):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.baddbmm(additive(t)[None], q, k.transpose(1, 2), beta=1, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


def baddbmm_viewed(q, k, v, m):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1, 1, t), q, k.transpose(1, 2), beta=0, alpha=SCALE).view(b, h, t, t)
    weights = scores.masked_fill(~causal(t), -INF).softmax(-1).view(b * h, t, t)
    return torch.bmm(weights, v).view(b, h, t, d)


def masked_in_place(q, k, v, m):
    scores = q @ k.mT
    scores *= SCALE
    scores.masked_fill_(~causal(q.shape[2]), -INF)
    return scores.softmax(-1) @ v


def masked_by_buffer(q, k, v, m):
    t = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(m.lower[:, :, :t, :t] == 0, -INF).softmax(-1) @ v


def multiplied_mask(q, k, v, m):
    lower = m.lower[:, :, : q.shape[2], : q.shape[2]]
    return (q @ k.mT * SCALE * lower - 1e4 * (1 - lower)).softmax(-1) @ v


def where_mask(q, k, v, m):
    return torch.where(causal(q.shape[2]), q @ k.mT * SCALE, torch.finfo(q.dtype).min).softmax(-1) @ v


def where_tensor(q, k, v, m):
    scores = q @ k.mT * SCALE
    return torch.where(causal(q.shape[2]), scores, torch.full_like(scores, -1e9)).softmax(-1) @ v


def mask_then_scale(q, k, v, m):
    return ((q @ k.mT + torch.full((q.shape[2],) * 2, -1e9).triu(1)) * SCALE).softmax(-1) @ v


def float32_softmax(q, k, v, m):
    scores = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[2]), -INF)
    return functional.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), 0.1, m.training) @ v


def written_softmax(q, k, v, m):
    scores = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[2]), -INF)
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


def softcap(q, k, v, m):
    return (0.5 * torch.tanh(q @ k.mT * SCALE / 0.5) + additive(q.shape[2])).softmax(-1) @ v


def window_mask(tokens: int, window: int) -> Tensor:
    i = torch.arange(tokens)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < window)


def sliding_window(q, k, v, m):
    return (q @ k.mT * SCALE).masked_fill(~window_mask(q.shape[2], 4), -INF).softmax(-1) @ v


def wide_sliding_window(q, k, v, m):
    return (q @ k.mT * SCALE).masked_fill(~window_mask(q.shape[2], 200), -INF).softmax(-1) @ v


def very_wide_sliding_window(q, k, v, m):
    return (q @ k.mT * SCALE).masked_fill(~window_mask(q.shape[2], 32768), -INF).softmax(-1) @ v


def two_masks(q, k, v, m):
    scores = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[2]), -INF)
    i = torch.arange(q.shape[2])
    return torch.where(i[:, None] - i[None] < 3, scores, -INF).softmax(-1) @ v


def unmasked(q, k, v, m):
    return (q @ k.mT * SCALE).softmax(-1) @ v


ROOT = 1 / math.sqrt(WIDTH)
SPELLINGS: list[tuple[Any, Mask, int, float]] = [
    (sdpa_causal_flag, Causal(), 4, ROOT),
    (sdpa_additive_mask, Causal(), 4, ROOT),
    (sdpa_boolean_mask, Causal(), 4, 0.2),
    (sdpa_unmasked, Unmasked(), 4, ROOT),
    (sdpa_grouped_flag, Causal(), 2, ROOT),
    (sdpa_repeat_interleave, Causal(), 2, ROOT),
    (sdpa_expand, Causal(), 2, ROOT),
    (pre_scaled_query, Causal(), 4, SCALE),
    (both_operands_scaled, Causal(), 4, ROOT),
    (post_scaled_scores, Causal(), 4, SCALE),
    (divided_scores, Causal(), 4, ROOT),
    (divided_by_a_tensor, Causal(), 4, ROOT),
    (einsum, Causal(), 4, SCALE),
    (einsum_token_major, Causal(), 4, SCALE),
    (grouped_einsum, Causal(), 2, SCALE),
    (grouped_matmul, Causal(), 2, SCALE),
    (batched_bmm, Causal(), 4, SCALE),
    (baddbmm, Causal(), 4, SCALE),
    (baddbmm_viewed, Causal(), 4, SCALE),
    (masked_in_place, Causal(), 4, SCALE),
    (masked_by_buffer, Causal(), 4, SCALE),
    (multiplied_mask, Causal(), 4, SCALE),
    (where_mask, Causal(), 4, SCALE),
    (where_tensor, Causal(), 4, SCALE),
    (mask_then_scale, Causal(), 4, SCALE),
    (float32_softmax, Causal(), 4, SCALE),
    (written_softmax, Causal(), 4, SCALE),
    (softcap, Causal(), 4, SCALE),
    (sliding_window, SlidingWindow(4), 4, SCALE),
    (wide_sliding_window, SlidingWindow(200), 4, SCALE),
    (very_wide_sliding_window, SlidingWindow(32768), 4, SCALE),
    (two_masks, SlidingWindow(3), 4, SCALE),
    (unmasked, Unmasked(), 4, SCALE),
]


@pytest.mark.parametrize(
    ("attend", "mask", "kv_heads", "scale"), SPELLINGS, ids=lambda x: getattr(x, "__name__", "")
)
def test_finds_every_spelling(attend, mask, kv_heads, scale):
    found = run_recognition(Attend(attend, kv_heads).eval(), hidden())
    region = found.region
    assert (region.heads, region.kv_heads, region.head_dim) == (HEADS, kv_heads, WIDTH)
    assert region.mask == mask
    assert argument(region.node, "mask") is None
    assert argument(region.node, "scale") == pytest.approx(scale, rel=1e-7)
    assert region.softcap == pytest.approx(0.5 if attend is softcap else 0.0)
    assert found.difference.max() < 1e-5
    # the mask's making and the square of scores are gone
    left = found.operations()
    assert not any(
        f"aten.{name}." in t for t in left for name in ("tril", "triu", "arange", "softmax", "masked_fill")
    )
    assert not any("repeat_interleave" in t or "expand" in t or "scaled_dot" in t for t in left)


def test_heads_repeated_the_other_way_round_stay_repeated():
    found = run_recognition(Attend(sdpa_tiled_heads, 2).eval(), hidden())
    assert (found.region.heads, found.region.kv_heads) == (4, 4)
    assert found.difference.max() < 1e-5


# look-alikes: attention in all but one place


def softmax_over_queries(q, k, v, m):
    return (q @ k.mT * SCALE).softmax(-2) @ v


def softmax_over_heads(q, k, v, m):
    return (q @ k.mT * SCALE).softmax(1) @ v


def scale_from_data(q, k, v, m):
    return (q @ k.mT * q.mean()).softmax(-1) @ v


def learned_temperature(q, k, v, m):
    return (q @ k.mT * m.temperature).softmax(-1) @ v


def scale_per_query(q, k, v, m):
    return (q @ k.mT * torch.arange(1, q.shape[2] + 1).log()[:, None]).softmax(-1) @ v


def two_consumers(q, k, v, m):
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v + weights.mean()


def scores_used_twice(q, k, v, m):
    scores = q @ k.mT * SCALE
    return scores.softmax(-1) @ v + scores.mean()


def changed_weights(q, k, v, m):
    return ((q @ k.mT * SCALE).softmax(-1) ** 2) @ v


def mask_before_softcap(q, k, v, m):
    return (torch.tanh((q @ k.mT + additive(q.shape[2])) * SCALE)).softmax(-1) @ v


def tanh_twice(q, k, v, m):
    return torch.tanh(torch.tanh(q @ k.mT)).softmax(-1) @ v


def clipped_scores(q, k, v, m):
    return (q @ k.mT).clamp(-0.1, 0.1).softmax(-1) @ v


def values_over_queries(q, k, v, m):
    return (q @ k.mT * SCALE).softmax(-1).mT @ v


TWINS = [
    (softmax_over_queries, "softmax runs over axis"),
    (softmax_over_heads, "softmax runs over axis"),
    (scale_from_data, "scale of the scores depends on data"),
    (learned_temperature, "scale of the scores depends on data"),
    (scale_per_query, "not one number"),
    (two_consumers, "second consumer"),
    (scores_used_twice, "scores are also used by"),
    (changed_weights, "go through pow"),
    (mask_before_softcap, "differs from the original"),
    (tanh_twice, "tanh twice"),
    (clipped_scores, "differs from the original"),
    (values_over_queries, "values are summed over another axis"),
]


@pytest.mark.parametrize(("attend", "reason"), TWINS, ids=lambda x: getattr(x, "__name__", ""))
def test_refuses_a_look_alike(attend, reason):
    found = run_recognition(Attend(attend).eval(), hidden())
    assert reason in found.reason
    assert found.difference.max() < 1e-5


def anti_causal(q, k, v, m):
    return (q @ k.mT * SCALE).masked_fill(causal(q.shape[2]).mT.logical_not(), -INF).softmax(-1) @ v


def strictly_causal_but_self(q, k, v, m):
    # causal, and the first token is hidden from all but itself
    i = torch.arange(q.shape[2])
    visible = causal(q.shape[2]) & ((i[None] > 0) | (i[:, None] == 0))
    return (q @ k.mT * SCALE).masked_fill(~visible, -INF).softmax(-1) @ v


def one_flipped_entry(q, k, v, m):
    t = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(m.flipped[:, :, :t, :t] == 0, -INF).softmax(-1) @ v


def late_exception(q, k, v, m):
    i = torch.arange(q.shape[2])
    visible = causal(q.shape[2]) & ~((i[:, None] == 900) & (i[None] == 7))
    return (q @ k.mT * SCALE).masked_fill(~visible, -INF).softmax(-1) @ v


def linear_bias(q, k, v, m):
    i = torch.arange(q.shape[2])
    return (q @ k.mT * SCALE + additive(q.shape[2]) - 0.1 * (i[:, None] - i[None]).abs()).softmax(-1) @ v


def heads_differ(q, k, v, m):
    t = q.shape[2]
    reach = torch.tensor([2, 3, 4, 5]).view(4, 1, 1)
    i = torch.arange(t)
    visible = causal(t) & (i[:, None] - i[None] < reach)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def mask_from_data(q, k, v, m):
    return (q @ k.mT * SCALE).masked_fill((q.sum(-1, keepdim=True) > 2).mT, -1e9).softmax(-1) @ v


def random_bias(q, k, v, m):
    return (q @ k.mT * SCALE + m.lower[..., : q.shape[2], : q.shape[2]] * m.temperature).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (anti_causal, "neither causal"),
        (strictly_causal_but_self, "neither causal"),
        (one_flipped_entry, "neither causal"),
        (late_exception, "neither causal"),
        (heads_differ, "neither causal"),
        (linear_bias, "adds values"),
        (mask_from_data, "values of x"),
        (random_bias, "parameter"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_proves_nothing_about_a_mask_that_only_looks_known(attend, why):
    found = run_recognition(Attend(attend).eval(), hidden())
    assert found.region.mask == Runtime()
    assert why in found.region.node.meta["mask_unproven"]
    assert not argument(found.region.node, "causal")
    assert found.difference.max() < 1e-5


def test_refuses_active_dropout_and_accepts_it_in_eval():
    def attend(q, k, v, m):
        return functional.dropout((q @ k.mT * SCALE).softmax(-1), 0.2, m.training) @ v

    module = Attend(attend).eval()
    assert run_recognition(module, hidden()).region.mask == Unmasked()
    graph = export(module.train(), (hidden(),))
    refusals = recognise(graph, (hidden(),))
    assert [r.reason for r in refusals] == ["dropout is active (p=0.2): capture the model in eval()"]
    assert not attention_regions(graph)


def test_says_nothing_about_a_softmax_that_is_no_attention():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(MODEL, 4)
            self.weight = nn.Parameter(torch.randn(MODEL, 4))

        def forward(self, x):
            return self.gate(x).softmax(-1) + (x @ self.weight).softmax(-1)

    found = run_recognition(Router().eval(), hidden())
    assert found.refusals == []
    assert found.regions == []


# padding


def keep_marks(tokens: int = 11) -> Tensor:
    marks = torch.ones(2, tokens, dtype=torch.int64)
    marks[1, :4] = 0
    return marks


def padded(q, k, v, m, marks):
    return (q @ k.mT * SCALE).masked_fill(marks[:, None, None, :] == 0, -INF).softmax(-1) @ v


def padded_additive(q, k, v, m, marks):
    return (q @ k.mT * SCALE + (1.0 - marks[:, None, None, :].to(q.dtype)) * -1e9).softmax(-1) @ v


def padded_causal(q, k, v, m, marks):
    visible = causal(q.shape[2]) & marks[:, None, None, :].bool()
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def padded_window(q, k, v, m, marks):
    visible = window_mask(q.shape[2], 3) & marks[:, None, None, :].bool()
    return (q @ k.mT * SCALE).masked_fill(~visible, -1e9).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "mask"),
    [
        (padded, Padding()),
        (padded_additive, Padding()),
        (padded_causal, Causal()),
        (padded_window, SlidingWindow(3)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_padding_input_becomes_positions(attend, mask):
    found = run_recognition(Attend(attend).eval(), hidden(), keep_marks())
    assert found.region.mask == mask
    assert argument(found.region.node, "mask") is None
    assert argument(found.region.node, "positions") is not None
    # rows of padding tokens mean nothing under a causal mask
    real = keep_marks().bool()
    assert found.difference[real].max() < 1e-5


def segments(q, k, v, m, marks):
    visible = marks[:, None, :, None] == marks[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def test_a_mask_of_segments_is_not_padding():
    found = run_recognition(Attend(segments).eval(), hidden(), keep_marks())
    assert found.region.mask == Runtime()
    assert "values of" in found.region.node.meta["mask_unproven"]
    assert found.difference.max() < 1e-5


# structure around the attention


def test_layers_paths_and_regions_are_numbered():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Attend(post_scaled_scores) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    graph = export(Stack().eval(), (hidden(),))
    assert recognise(graph, (hidden(),)) == []
    assert [(r.layer, r.path, r.region) for r in attention_regions(graph)] == [
        (i, f"blocks.{i}", str(i)) for i in range(3)
    ]
    assert all(r.node.meta["val"][0].shape[1] == HEADS for r in attention_regions(graph))


def test_a_second_run_changes_nothing():
    module = Attend(sliding_window).eval()
    graph = export(module, (hidden(),))
    recognise(graph, (hidden(),))
    before = str(graph.graph)
    assert recognise(graph, (hidden(),)) == []
    assert str(graph.graph) == before


def test_bfloat16_keeps_its_types():
    module = Attend(float32_softmax).eval().to(torch.bfloat16)
    x = hidden().to(torch.bfloat16)
    graph = export(module, (x,))
    assert recognise(graph, (x,)) == []
    assert len(attention_regions(graph)) == 1
    got = graph(x)
    assert got.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa
    assert torch.allclose(got, module(x), atol=2e-2, rtol=0)


def test_a_fixed_length_is_proven_at_that_length():
    found = run_recognition(Attend(post_scaled_scores).eval(), hidden(), axes=(0,))
    assert found.region.mask == Causal()
    assert found.difference.max() < 1e-5


class MultiHead(nn.Module):
    def __init__(
        self, batch_first: bool, need_weights: bool, masked: bool, use_weights: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(MODEL, HEADS, batch_first=batch_first)
        self.options = (batch_first, need_weights, masked, use_weights)

    def forward(self, x: Tensor) -> Tensor:
        batch_first, need_weights, masked, use_weights = self.options
        mask = additive(x.shape[1 if batch_first else 0]) if masked else None
        out, weights = self.attention(x, x, x, need_weights=need_weights, attn_mask=mask)
        return out + weights.mean() if use_weights else out


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_finds_multihead_attention(batch_first, need_weights, masked):
    x = hidden() if batch_first else hidden().transpose(0, 1).contiguous()
    module = MultiHead(batch_first, need_weights, masked).eval()
    graph = export(module, (x,))
    assert recognise(graph, (x,)) == []
    (region,) = attention_regions(graph)
    assert region.mask == (Causal() if masked else Unmasked())
    assert (region.heads, region.path) == (HEADS, "attention")
    assert torch.allclose(graph(x), module(x), atol=1e-5, rtol=0)


def test_refuses_multihead_attention_whose_weights_are_used():
    found = run_recognition(MultiHead(True, True, False, use_weights=True).eval(), hidden())
    assert "second consumer" in found.reason


class Encoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(MODEL, HEADS, 64, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def test_finds_a_transformer_encoder_in_eval_and_without_dropout_in_training():
    for module in (Encoder(0.1).eval(), Encoder(0.0).train()):
        found = run_recognition(module, hidden())
        assert [(r.layer, r.mask) for r in found.regions] == [(0, Unmasked()), (1, Unmasked())]
        assert found.difference.max() < 1e-5


def test_refuses_a_transformer_encoder_in_training_with_dropout():
    graph = export(Encoder(0.1).train(), (hidden(),))
    assert [r.reason[:17] for r in recognise(graph, (hidden(),))] == ["dropout is active"] * 2
    assert not attention_regions(graph)


def test_finds_the_padding_of_a_transformer_encoder():
    found = run_recognition(Encoder(0.1).eval(), hidden(), ~keep_marks().bool())
    assert [r.mask for r in found.regions] == [Padding(), Padding()]
    assert found.difference.max() < 1e-5
