"""The law of a program: any split of the tokens over calls gives what one call gives, which is the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.program import build_program
from tests.models import CAUSAL_FAMILIES, VOCAB_SIZE, captured_tiny, tiny_model

SPLITS = ([20], [1] * 20, [7, 5, 1, 1, 6], [19, 1], [1, 19])


def prompts(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


def in_pieces(session: TorchSession, tokens: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    state, pieces, start = session.new_state(1), [], 0
    for length in lengths:
        pieces.append(session.extend(state, tokens[start : start + length]))
        start += length
    return np.concatenate(pieces)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_every_split_equals_the_model(family: str) -> None:
    model = tiny_model(family)
    session = TorchSession(build_program(captured_tiny(family)))
    (tokens,) = prompts(20)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    for lengths in SPLITS:
        np.testing.assert_allclose(in_pieces(session, tokens, lengths), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_rows_of_different_lengths_equal_each_row_alone(family: str) -> None:
    session = TorchSession(build_program(captured_tiny(family)))
    rows = prompts(11, 3, 17)
    state = session.new_state(3)
    together = session.prefill(state, rows)
    following = [session.decode(state, np.array([5, 6, 7])) for _ in range(2)]
    for index, row in enumerate(rows):
        alone = session.new_state(1)
        np.testing.assert_allclose(together[index], session.prefill(alone, [row])[0], atol=2e-5, rtol=0)
        for logits in following:
            np.testing.assert_allclose(
                logits[index], session.decode(alone, np.array([5 + index]))[0], atol=2e-5, rtol=0
            )


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_windowed_cache_holds_only_what_can_be_seen(family: str) -> None:
    session = TorchSession(build_program(captured_tiny(family)))
    state = session.new_state(1)
    session.prefill(state, prompts(300))
    for group in session.program.groups:
        held = state.tables[group.name].shape[1]
        assert held == (group.window - 1 if group.window else 300)


def test_only_the_wanted_rows_reach_the_language_model_head() -> None:
    program = build_program(captured_tiny("llama"))
    assert program.step is not None
    head = [n for n in program.step.graph.nodes if "lm_head" in str(n.args)][-1]
    gather = [n for n in program.step.graph.nodes if n.target is torch.ops.aten.gather.default]
    order = list(program.step.graph.nodes)
    assert len(gather) == 1
    assert order.index(gather[0]) < order.index(head)
