"""Passes together: windows on some layers, eviction on the others, codes everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.errors import MemcompileError
from memcompile.regions import attention_regions
from memcompile.rewrite.manager import apply
from tests.rewrite.tiny import calibration, entry, prompts, run, tiny_graph

WINDOWS: dict[str, Any] = {"window_tokens": 8, "sink_tokens": 2}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_windows_on_some_layers_eviction_on_the_others_codes_everywhere(
    kv_heads: int, tmp_path: Path
) -> None:
    graph = tiny_graph(layers=4, kv_heads=kv_heads)
    entries = [
        entry("attention.static", layers="every 2", expect=2, **WINDOWS),
        entry("kv.evict", keep_tokens=48, expect=2),
        entry("kv.quantize", bits=8, expect=4),
    ]
    result = apply(graph, entries, calibration=calibration(tmp_path))
    found = [(r.window_tokens, r.evict is not None, r.bits) for r in attention_regions(graph)]
    assert found == [(8, False, 8), (None, True, 8)] * 2
    assert len(result.refusals) == 2
    rows = prompts(1, 30)
    for row, together in zip(rows, run(graph, rows), strict=True):
        torch.testing.assert_close(run(graph, [row])[0], together, atol=1e-5, rtol=0)


def test_the_order_of_the_plan_does_not_matter(tmp_path: Path) -> None:
    entries = [
        entry("attention.static", layers=0, **WINDOWS),
        entry("kv.evict", keep_tokens=48),
        entry("kv.quantize", bits=4),
    ]
    outputs = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        graph = tiny_graph()
        apply(graph, [entries[index] for index in order], calibration=calibration(tmp_path))
        outputs.append(run(graph, prompts(20))[0])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=0, rtol=0)


def test_eviction_acts_on_the_heads_that_stayed_full(tmp_path: Path) -> None:
    graph = tiny_graph()
    entries = [
        entry("attention.static", layers=1, heads=[0], **WINDOWS),
        entry("kv.evict", keep_tokens=48),
        entry("kv.quantize"),
    ]
    apply(graph, entries, calibration=calibration(tmp_path))
    found = {
        r.region: (r.kv_head_ids, r.window_tokens, r.evict is not None, r.bits)
        for r in attention_regions(graph)
    }
    assert found == {
        "0": ((0, 1), None, True, 8),
        "1.full": ((1,), None, True, 8),
        "1.window": ((0,), 8, False, 8),
        "2": ((0, 1), None, True, 8),
    }


def test_eviction_of_windowed_layers_only_is_refused_with_the_reason(tmp_path: Path) -> None:
    entries = [
        entry("kv.evict", keep_tokens=48, layers="0-1"),
        entry("attention.static", layers="0-1", **WINDOWS),
    ]
    with pytest.raises(
        MemcompileError, match=r"MC303 kv\.evict: .* already holds only the window of 8 tokens"
    ):
        apply(tiny_graph(), entries)


def test_scales_are_measured_on_the_windowed_model(tmp_path: Path) -> None:
    plain, windowed = tiny_graph(), tiny_graph()
    apply(plain, [entry("kv.quantize")], calibration=calibration(tmp_path))
    apply(
        windowed,
        [entry("kv.quantize"), entry("attention.static", layers=0, window_tokens=1)],
        calibration=calibration(tmp_path),
    )
    name = "attention_1_k_scale"
    assert not torch.equal(plain.get_buffer(name), windowed.get_buffer(name))
    assert torch.equal(plain.get_buffer("attention_0_k_scale"), windowed.get_buffer("attention_0_k_scale"))
