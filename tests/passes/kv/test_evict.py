"""`kv.evict`: the policy it stores, its budgets, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.passes.kv.evict import EvictConfig
from memcompile.passes.kv.scores import KeyNorm, ObservedAttention, Recency
from memcompile.regions import EvictSpec, attention_regions
from memcompile.rewrite.entry import WorkloadSizes
from memcompile.rewrite.manager import apply
from memcompile.rewrite.registry import load_pass
from tests.rewrite.tiny import entry, prompts, run, tiny_graph


def preset(name: str, **values: Any) -> EvictConfig:
    config: EvictConfig = EvictConfig(**{**load_pass("kv.evict").presets[name].values, **values})
    return config


def evicted(config: EvictConfig, **options: Any) -> EvictSpec:
    graph = tiny_graph(layers=1, **options)
    apply(graph, [entry("kv.evict", config)])
    (region,) = attention_regions(graph)
    assert region.evict is not None
    return region.evict


def refusal(graph: fx.GraphModule, **options: Any) -> str:
    result = apply(graph, [entry("kv.evict", keep_tokens=64)], strict=False, **options)
    assert result.outcomes[0].rewritten == ()
    return result.refusals[0].reason


def test_snapkv_lets_the_last_queries_vote_and_keeps_them() -> None:
    spec = evicted(preset("snapkv", keep_tokens=256))
    assert spec == EvictSpec(
        ObservedAttention(32, 8**-0.5, pool="avg", pool_kernel=7, group_reduce="mean"),
        keep_tokens=256,
        observe_tokens=32,
        recent_tokens=32,
    )


def test_snapkv_scores_with_the_softcap_of_the_region() -> None:
    spec = evicted(preset("snapkv", keep_tokens=64), each={0: {"softcap": 5.0}})
    assert isinstance(spec.scorer, ObservedAttention)
    assert spec.scorer.softcap == 5.0


def test_streaming_keeps_the_first_and_the_last_tokens() -> None:
    spec = evicted(preset("streaming", keep_fraction=0.5))
    assert spec == EvictSpec(Recency(), keep_fraction=0.5, sink_tokens=4)


def test_knorm_protects_nothing() -> None:
    assert evicted(preset("knorm", keep_tokens=1)) == EvictSpec(KeyNorm(), keep_tokens=1)


def test_more_recent_tokens_may_be_protected_than_vote() -> None:
    assert evicted(preset("snapkv", keep_tokens=64, recent_tokens=50)).recent_tokens == 50


def test_the_forward_graph_computes_what_it_did() -> None:
    graph, rows = tiny_graph(), prompts(5, 40)
    want = run(graph, rows)
    apply(graph, [entry("kv.evict", keep_tokens=32)])
    for got, expected in zip(run(graph, rows), want, strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_refuses_a_windowed_region() -> None:
    each = {layer: {"window": 16} for layer in range(3)}
    assert refusal(tiny_graph(each=each)) == "its cache already holds only the window of 16 tokens it can see"


def test_refuses_a_mask_computed_at_run_time() -> None:
    assert "its mask is computed at run time" in refusal(tiny_graph(masked=True))


def test_refuses_attention_without_a_cache() -> None:
    each = {layer: {"causal": False} for layer in range(3)}
    assert "attention that is not causal has no cache" in refusal(tiny_graph(each=each))


def test_refuses_what_is_already_evicted() -> None:
    graph = tiny_graph()
    apply(graph, [entry("kv.evict", preset("knorm", keep_tokens=9))])
    assert refusal(graph) == "its cache is already evicted, by key_norm"


def test_refuses_a_share_smaller_than_what_is_always_kept() -> None:
    workload = WorkloadSizes(prompt_tokens=1000)
    result = apply(tiny_graph(), [entry("kv.evict", keep_fraction=0.01)], workload=workload, strict=False)
    assert "keep_fraction 0.01 of 1000 prompt tokens is 10, less than the 32" in result.refusals[0].reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither given, exactly one is needed"),
        ({"keep_tokens": 64, "keep_fraction": 0.5}, "both given, exactly one is needed"),
        ({"keep_tokens": 0}, "greater than or equal to 1"),
        ({"keep_fraction": 0.0}, "greater than 0"),
        ({"keep_fraction": 1.1}, "less than or equal to 1"),
        ({"keep_tokens": 31}, "keep_tokens is 31, less than the 32 tokens that are always kept"),
        ({"keep_tokens": 40, "sink_tokens": 9}, "less than the 41 tokens"),
        ({"keep_tokens": 64, "pool_kernel": 4}, "must be odd"),
        ({"keep_tokens": 64, "score": "magic"}, "observed_attention"),
        ({"keep_tokens": 64.5}, "valid integer"),
    ],
)
def test_refuses_a_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvictConfig(**values)


@pytest.mark.parametrize(
    ("values", "prompt", "idle"),
    [
        ({"keep_tokens": 64}, 65, False),
        ({"keep_tokens": 64}, 64, True),
        ({"keep_fraction": 0.99}, 64, False),
        ({"keep_fraction": 1.0}, 64, True),
    ],
)
def test_knows_when_it_would_evict_nothing(values: dict[str, Any], prompt: int, idle: bool) -> None:
    reason = load_pass("kv.evict").changes_nothing(EvictConfig(**values), WorkloadSizes(prompt))
    assert (reason is not None) == idle
