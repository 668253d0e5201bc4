"""Scorers: golden cases by hand, an independent slow twin in float64, padding, and export."""

from __future__ import annotations

import io
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.passes.kv.scores import KeyNorm, ObservedAttention, Recency
from memcompile.regions import Scorer


def example(
    tokens: int,
    window: int,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    width: int = 8,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, observed queries and positions of prompts of `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, groups, tokens, width, generator=generator)
    v = torch.randn(batch, groups, tokens, width, generator=generator)
    q = torch.randn(batch, heads, window, width, generator=generator)
    q[:, :, : max(0, window - tokens)] = 0.0
    return k, v, q, torch.arange(tokens).expand(batch, tokens)


def slow_snapkv(
    k: torch.Tensor,
    q: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    kernel: int,
    pool: str,
    reduce: str,
) -> np.ndarray:
    """SnapKV's score as its paper tells it, one number at a time in float64."""
    batch, groups, slots, width = k.shape
    heads, window = q.shape[1], q.shape[2]
    keys, queries = k.double().numpy(), q.double().numpy()
    scores = np.zeros((batch, groups, slots))
    for b in range(batch):
        used = [s for s in range(slots) if positions[b, s] >= 0]
        tokens = len(used)
        for g in range(groups):
            per_head = []
            for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
                votes = np.zeros(tokens)
                voters = min(window, tokens)
                for voter in range(voters):
                    query = queries[b, h, window - 1 - voter]
                    sees = tokens - voter  # the newest sees all, the one before all but one, ...
                    logits = []
                    for slot in used[:sees]:
                        logit = scale * sum(query[d] * keys[b, g, slot, d] for d in range(width))
                        logits.append(softcap * math.tanh(logit / softcap) if softcap else logit)
                    top = max(logits)
                    weights = [math.exp(logit - top) for logit in logits]
                    total = sum(weights)
                    for index, weight in enumerate(weights):
                        votes[index] += weight / total / voters
                votes[max(0, tokens - window) :] = 0.0
                padded = np.concatenate([np.zeros(kernel // 2), votes, np.zeros(kernel // 2)])
                slices = [padded[index : index + kernel] for index in range(tokens)]
                per_head.append([s.mean() if pool == "avg" else s.max() for s in slices])
            combined = np.mean(per_head, axis=0) if reduce == "mean" else np.max(per_head, axis=0)
            scores[b, g, used] = combined
    return scores


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(
    ("tokens", "window", "kernel"), [(1, 4, 7), (5, 8, 3), (9, 4, 1), (33, 8, 5), (40, 32, 7)]
)
def test_observed_attention_equals_its_slow_twin(
    tokens: int, window: int, kernel: int, pool: Any, reduce: Any
) -> None:
    k, v, q, positions = example(tokens, window)
    scorer = ObservedAttention(window, 0.5, pool=pool, pool_kernel=kernel, group_reduce=reduce)
    want = slow_snapkv(k, q, positions, scale=0.5, softcap=0.0, kernel=kernel, pool=pool, reduce=reduce)
    np.testing.assert_allclose(scorer(k, v, q, positions).numpy(), want, atol=2e-6, rtol=0)


def test_observed_attention_bends_scores_as_the_model_does() -> None:
    k, v, q, positions = example(20, 4)
    scorer = ObservedAttention(4, 2.0, softcap=1.5, pool_kernel=3)
    want = slow_snapkv(k, q, positions, scale=2.0, softcap=1.5, kernel=3, pool="avg", reduce="mean")
    np.testing.assert_allclose(scorer(k, v, q, positions).numpy(), want, atol=2e-6, rtol=0)


def test_observed_attention_golden() -> None:
    # two earlier keys with logits 0 and ln 3 for the only observed query, whose own key has logit ln 4
    k = torch.tensor([0.0, math.log(3), math.log(4)]).reshape(1, 1, 3, 1)
    q = torch.ones(1, 1, 1, 1)
    scores = ObservedAttention(1, 1.0, pool_kernel=1)(k, k, q, torch.arange(3).unsqueeze(0))
    torch.testing.assert_close(scores, torch.tensor([[[1 / 8, 3 / 8, 0.0]]]), atol=1e-6, rtol=0)


def test_pooling_spreads_a_vote_to_its_neighbours() -> None:
    k = torch.zeros(1, 1, 6, 1)
    k[0, 0, 2] = 40.0
    q = torch.ones(1, 1, 1, 1)
    positions = torch.arange(6).unsqueeze(0)
    average = ObservedAttention(1, 1.0, pool="avg", pool_kernel=3)(k, k, q, positions)
    maximum = ObservedAttention(1, 1.0, pool="max", pool_kernel=3)(k, k, q, positions)
    third = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0, 0]).reshape(1, 1, 6)
    torch.testing.assert_close(average, third, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        maximum, torch.tensor([0.0, 1, 1, 1, 0, 0]).reshape(1, 1, 6), atol=1e-6, rtol=0
    )


def test_query_heads_of_a_group_agree_by_mean_or_max() -> None:
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).reshape(1, 1, 3, 2)
    q = torch.tensor([[30.0, 0.0], [0.0, 30.0]]).reshape(1, 2, 1, 2)
    positions = torch.arange(3).unsqueeze(0)
    mean = ObservedAttention(1, 1.0, pool_kernel=1)(k, k, q, positions)
    most = ObservedAttention(1, 1.0, pool_kernel=1, group_reduce="max")(k, k, q, positions)
    torch.testing.assert_close(mean, torch.tensor([[[0.5, 0.5, 0.0]]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(most, torch.tensor([[[1.0, 1.0, 0.0]]]), atol=1e-6, rtol=0)


def test_recency_golden() -> None:
    k = torch.zeros(1, 2, 4, 3)
    scores = Recency()(k, k, None, torch.tensor([[0, 1, 2, -1]]))
    assert scores.tolist() == [[[0.0, 1.0, 2.0, -1.0]] * 2]


def test_key_norm_golden() -> None:
    k = torch.tensor([[3.0, 4.0], [0.0, 1.0], [5.0, 12.0]]).reshape(1, 1, 3, 2)
    assert KeyNorm()(k, k, None, torch.arange(3).unsqueeze(0)).tolist() == [[[-5.0, -1.0, -13.0]]]


SCORERS: list[Scorer] = [
    ObservedAttention(4, 0.5),
    ObservedAttention(4, 0.5, pool="max"),
    Recency(),
    KeyNorm(),
]


def name_of(scorer: Scorer) -> str:
    return f"{scorer.name}-{getattr(scorer, 'pool', '')}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scorer", SCORERS, ids=name_of)
def test_a_padded_row_scores_as_it_does_alone(scorer: Scorer, side: str) -> None:
    k, v, q, positions = example(11, 4, batch=1)
    alone = scorer(k, v, q, positions)
    # empty slots may hold anything that a buffer once held
    rubbish = torch.full((1, 2, 5, 8), 1e4)
    empty = torch.full((1, 5), -1)
    order = (lambda a, b: torch.cat((b, a), -2)) if side == "left" else (lambda a, b: torch.cat((a, b), -2))
    slots = torch.cat((empty, positions) if side == "left" else (positions, empty), 1)
    padded = scorer(order(k, rubbish), order(v, rubbish), q, slots)
    torch.testing.assert_close(padded[:, :, slots[0] >= 0], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scorer", SCORERS, ids=name_of)
def test_half_types_are_scored_in_float32(scorer: Scorer) -> None:
    k, v, q, positions = example(20, 4)
    low = [tensor.to(torch.bfloat16) for tensor in (k, v, q)]
    scores = scorer(*low, positions)
    assert scores.dtype == torch.float32
    wide = scorer(*(tensor.float() for tensor in low), positions)
    torch.testing.assert_close(scores, wide, atol=0, rtol=0)


@pytest.mark.parametrize("scorer", SCORERS, ids=name_of)
def test_scorers_compare_and_hash_by_their_settings(scorer: Scorer) -> None:
    twin = type(scorer)(**{field.name: getattr(scorer, field.name) for field in fields(scorer)})
    assert twin == scorer
    assert hash(twin) == hash(scorer)


# torch.onnx of torch 2.13 warns about its own calls
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("scorer", SCORERS, ids=name_of)
def test_scorers_export_to_onnx_with_any_number_of_tokens(scorer: Scorer) -> None:
    import onnxruntime

    class Module(torch.nn.Module):
        def forward(self, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return scorer(k, v, q, p)

    batch, slots = torch.export.Dim("batch", min=1), torch.export.Dim("slots", min=1)
    sizes = {"k": {0: batch, 2: slots}, "v": {0: batch, 2: slots}, "q": {0: batch}, "p": {0: batch, 1: slots}}
    program = torch.export.export(Module().eval(), example(13, 4), dynamic_shapes=sizes)
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=list("kvqp"))
    assert exported is not None
    buffer = io.BytesIO()
    exported.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    used = {given.name for given in session.get_inputs()}
    for tokens in (1, 13, 40):
        inputs = example(tokens, 4, batch=3, seed=tokens)
        feeds = {name: tensor.numpy() for name, tensor in zip("kvqp", inputs, strict=True) if name in used}
        (got,) = session.run(None, feeds)
        np.testing.assert_allclose(got, scorer(*inputs).numpy(), atol=1e-5, rtol=0)
