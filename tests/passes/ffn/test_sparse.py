"""`ffn.sparse` on captured models: what is found, refused and computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.program import Program, build_program, without_choices
from memcompile.regions import ffn_regions
from memcompile.rewrite.entry import WorkloadSizes
from memcompile.rewrite.manager import apply
from memcompile.rewrite.registry import load_pass
from memcompile.rewrite.step_bytes import step_bytes
from tests.models import captured_tiny
from tests.rewrite.tiny import entry

MODES = ("token", "prefill")


def program_of(family: str = "llama", **values: Any) -> Program:
    captured = captured_tiny(family)
    if values:
        apply(captured.graph, [entry("ffn.sparse", **values)])
    return build_program(captured)


def decoded(program: Program, lengths: tuple[int, ...] = (70,)) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of the prompts, and of three steps after them [steps,B,V]."""
    session = TorchSession(program)
    state = session.new_state(len(lengths))
    rows = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    read = session.prefill(state, rows)
    return read, np.stack([session.decode(state, np.full(len(lengths), 5 + i)) for i in range(3)])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_gated_layers_are_found_in_every_spelling(family: str) -> None:
    found = ffn_regions(captured_tiny(family).graph)
    assert [region.layer for region in found] == list(range(len(found)))
    if family == "phi3":
        # one product gives gate and up together
        assert found == []
        return
    assert len(found) >= 2
    assert {(r.width, r.neurons, r.reason) for r in found} == {(found[0].width, 64, "")}
    assert found[0].activation == ("gelu_tanh" if family == "gemma3" else "silu")


@pytest.mark.parametrize("when", MODES)
def test_a_prompt_is_read_whole_and_a_token_computes_its_share(when: str) -> None:
    (whole_read,), whole = decoded(program_of())
    (read,), sparse = decoded(program_of(keep_fraction=0.4, when=when))
    np.testing.assert_allclose(read, whole_read, atol=1e-6, rtol=0)
    assert np.abs(sparse - whole).max() > 1e-3
    _, most = decoded(program_of(keep_fraction=0.999, when=when))
    np.testing.assert_allclose(most, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("when", MODES)
def test_rows_of_different_lengths_choose_as_alone(when: str) -> None:
    program = program_of(keep_fraction=0.3, when=when)
    _, together = decoded(program, (70, 31))
    for row, length in enumerate((70, 31)):
        _, alone = decoded(program, (length,))
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=1e-5, rtol=0)


def test_neurons_of_a_prompt_are_state_of_the_program() -> None:
    program = program_of(keep_fraction=0.3, when="prefill", token_fraction=0.25)
    assert [state.neurons for state in program.states] == [64, 64]
    session = TorchSession(program)
    state = session.new_state(1)
    session.prefill(state, [list(range(3, 60))])
    counts = {region: total.clone() for region, total in state.neurons.items()}
    # every eighth of 57 tokens, sixteen neurons each
    assert [int(total.sum()) for total in counts.values()] == [8 * 16] * 2
    session.decode(state, np.array([5]))
    assert all(torch.equal(total, counts[region]) for region, total in state.neurons.items())


def test_extending_by_known_tokens_is_decoding_them() -> None:
    session = TorchSession(program_of(keep_fraction=0.3))
    states = [session.new_state(1) for _ in range(2)]
    for state in states:
        session.prefill(state, [list(range(3, 60))])
    given = session.extend(states[0], [5, 6, 7])
    for index, token in enumerate((5, 6, 7)):
        np.testing.assert_allclose(session.decode(states[1], np.array([token]))[0], given[index], atol=1e-6)


def test_a_program_without_choices_is_the_whole_one() -> None:
    stripped = without_choices(program_of(keep_fraction=0.3, when="prefill"))
    assert not stripped.decodes_alone
    assert not any(state.neurons for state in stripped.states)
    np.testing.assert_allclose(decoded(stripped)[1], decoded(program_of())[1], atol=1e-5, rtol=0)


def test_quantised_layers_are_refused_and_the_rest_is_quantised_after(tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    apply(captured.graph, [entry("weights.quantize", bits=8, method="rtn")])
    region = ffn_regions(captured.graph)[0]
    one = load_pass("ffn.sparse")
    refusal = one.check(region, one.Config())
    assert "quantised" in refusal.reason
    captured = captured_tiny("llama")
    entries = [entry("ffn.sparse", keep_fraction=0.4), entry("weights.quantize", bits=8, method="rtn")]
    result = apply(captured.graph, entries)
    assert [len(outcome.rewritten) for outcome in result.outcomes] == [2, 10]
    assert np.isfinite(decoded(build_program(captured))[1]).all()


def test_a_step_is_predicted_to_read_less() -> None:
    workload = WorkloadSizes(prompt_tokens=100, new_tokens=10)
    layer = 64 * 48 * 4
    whole, token, fixed = (
        step_bytes(program.forward, workload).weights
        for program in (
            program_of(),
            program_of(keep_fraction=0.25),
            program_of(keep_fraction=0.25, when="prefill"),
        )
    )
    # two layers: of three matrices the gate and a quarter of the others, or a quarter of all
    assert whole - token == 2 * (3 * layer - int(1.5 * layer))
    assert whole - fixed == 2 * (3 * layer - int(0.75 * layer))
