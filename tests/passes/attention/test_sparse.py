"""`attention.sparse`: pages that decoding chooses, in torch; what is refused and what combines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.program import Program, build_program, without_choices
from memcompile.regions import argument, attention_nodes, attention_regions
from memcompile.rewrite.entry import WorkloadSizes
from memcompile.rewrite.manager import apply
from memcompile.rewrite.registry import load_pass
from tests.models import captured_tiny
from tests.rewrite.tiny import calibration, entry, tiny_graph

PAGES: dict[str, Any] = {"selector": "pages", "keep_tokens": 32, "dense_tokens": 0}


def program_of(folder: Path, **values: Any) -> Program:
    captured = captured_tiny("llama", num_hidden_layers=3)
    if values:
        apply(captured.graph, [entry("attention.sparse", **values)], calibration=calibration(folder))
    return build_program(captured)


def tokens(count: int) -> list[int]:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def decoded(program: Program, lengths: tuple[int, ...], steps: int = 4) -> np.ndarray:
    """Logits of each step after prompts of these lengths [steps,B,V]."""
    session = TorchSession(program)
    state = session.new_state(len(lengths))
    session.prefill(state, [tokens(length) for length in lengths])
    return np.stack([session.decode(state, np.full(len(lengths), 5 + step)) for step in range(steps)])


def test_a_budget_of_every_page_is_dense(tmp_path: Path) -> None:
    dense = decoded(program_of(tmp_path), (150,))
    for kept, begin in ((160, 0), (32, 154)):
        got = decoded(program_of(tmp_path, **{**PAGES, "keep_tokens": kept, "dense_tokens": begin}), (150,))
        np.testing.assert_allclose(got, dense, atol=1e-5, rtol=0)
    assert np.abs(decoded(program_of(tmp_path, **PAGES), (150,)) - dense).max() > 1e-3


@pytest.mark.parametrize("bits", [0, 8])
def test_rows_of_different_lengths_choose_as_alone(bits: int, tmp_path: Path) -> None:
    captured = captured_tiny("llama", num_hidden_layers=3)
    entries = [entry("attention.sparse", **PAGES), *([entry("kv.quantize", bits=bits)] if bits else [])]
    apply(captured.graph, entries, calibration=calibration(tmp_path))
    program = build_program(captured)
    together = decoded(program, (150, 70, 31))
    for row, length in enumerate((150, 70, 31)):
        np.testing.assert_allclose(decoded(program, (length,))[:, 0], together[:, row], atol=2e-5, rtol=0)


def test_extending_by_known_tokens_is_decoding_them(tmp_path: Path) -> None:
    session = TorchSession(program_of(tmp_path, **PAGES))
    state = session.new_state(1)
    session.prefill(state, [tokens(150)])
    given = session.extend(state, [5, 6, 7, 8])
    np.testing.assert_allclose(given, decoded(session.program, (150,))[:, 0], atol=1e-6, rtol=0)


def test_the_bounds_are_state_of_the_program(tmp_path: Path) -> None:
    program = program_of(tmp_path, **PAGES)
    session = TorchSession(program)
    state = session.new_state(2)
    before = state.nbytes
    session.prefill(state, [tokens(100), tokens(40)])
    # two rows of bounds for each of 7 pages, beside keys and values of 100 tokens and their positions
    heads, width = 2, 16
    caches = 3 * 2 * heads * width * 4 * 2 * 100
    bounds = 3 * 2 * heads * width * 4 * 2 * 7
    assert (before, state.nbytes) == (0, caches + bounds + 2 * 100 * 8)
    for region, kept in state.bounds.items():
        keys = state.caches[region][0]
        torch.testing.assert_close(kept[0, :, 6, :width], keys[0, :, 96:].amax(1))
        torch.testing.assert_close(kept[1, :, 2, width:], keys[1, :, 32:40].amin(1))


def test_a_program_without_choices_is_the_dense_one(tmp_path: Path) -> None:
    paged = program_of(tmp_path, **PAGES)
    stripped = without_choices(paged)
    assert [state.page_tokens for state in paged.states] == [16] * 3
    assert [state.page_tokens for state in stripped.states] == [0] * 3
    np.testing.assert_allclose(
        decoded(stripped, (100,)), decoded(program_of(tmp_path), (100,)), atol=1e-6, rtol=0
    )
    # and the paged one is as it was
    assert all(argument(node, "page_tokens") == 16 for node in attention_nodes(paged.forward))


def test_quest_leaves_the_first_layers_whole_and_combines_with_a_choice_of_the_prompt() -> None:
    graph = tiny_graph(layers=4)
    quest = load_pass("attention.sparse").presets["quest"].values
    entries = [entry("attention.sparse", selector="shape"), entry("attention.sparse", **quest)]
    result = apply(graph, entries)
    found = [(r.page_tokens, argument(r.node, "pattern") is not None) for r in attention_regions(graph)]
    assert found == [(0, True), (0, True), (16, True), (16, True)]
    assert [len(outcome.rewritten) for outcome in result.outcomes] == [4, 2]


def test_windowed_and_evicted_caches_are_refused(tmp_path: Path) -> None:
    one = load_pass("attention.sparse")
    config = one.Config(**PAGES)
    graph = tiny_graph(each={0: {"window": 8}})
    apply(graph, [entry("kv.evict", keep_tokens=40, layers=1)], calibration=calibration(tmp_path))
    windowed, evicted, plain = (one.check(region, config) for region in attention_regions(graph))
    assert "only a window of 8 tokens" in windowed.reason
    assert "evicted after prefill" in evicted.reason
    assert plain.page_keep == 2
    apply(graph, [entry("attention.sparse", layers=2, **PAGES)])
    last = attention_regions(graph)[2]
    refusal = load_pass("kv.evict").check(last, load_pass("kv.evict").Config(keep_tokens=40))
    assert "by pages of a whole cache" in refusal.reason
    assert "already chooses" in one.check(last, config).reason


def test_a_step_is_predicted_to_read_its_budget_and_the_bounds() -> None:
    one, region = load_pass("attention.sparse"), attention_regions(tiny_graph(head_dim=64))[0]
    workload = WorkloadSizes(prompt_tokens=16_000, new_tokens=384)
    facts = one.check(region, one.Config(selector="pages", keep_tokens=1024))
    token = 2 * 2 * 64 * 4
    cost = one.cost(region, facts, workload)
    assert cost.state_bytes == token * (16_384 + 1024)
    # keys and values of 1,024 tokens, bounds of 1,024 pages, query and output
    assert cost.bytes_moved == token * 2 * 1024 + 2 * 4 * 64 * 4
