"""Every family's tiny model, lowered, gives what the model gives: prefill in chunks, then token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.frontend import Captured, capture
from tests.backends.tvm.build import session_of
from tests.backends.tvm.conftest import Plain
from tests.models import CAUSAL_FAMILIES, OTHER_FAMILIES, captured_tiny, example_inputs, tiny_model

TOLERANCE = 5e-6  # float32 sums in another order, logits of size 1


def _tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(t) for t in torch.randint(3, 128, (count,), generator=generator)]


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_step_agrees_with_the_model_however_the_tokens_are_split(family: str, plain: Plain) -> None:
    model = tiny_model(family)
    tokens = _tokens(50)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    _, session = plain(family)
    # the artifact's chunks are of 16 tokens: prompts of one chunk, of several with a rest, and of one token
    for prompt in (1, 16, 41):
        state = session.new_state(1, prompt, 50 - prompt)
        (logits,) = session.prefill(state, [tokens[:prompt]], all_logits=True)
        np.testing.assert_allclose(logits, expected[:prompt], atol=TOLERANCE)
        np.testing.assert_allclose(
            session.extend(state, tokens[prompt:45]), expected[prompt:45], atol=TOLERANCE
        )
        for index in range(45, 50):
            given = session.decode(state, np.array([tokens[index]]))
            np.testing.assert_allclose(given[0], expected[index], atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tokens, model = _tokens(20), tiny_model("llama", num_hidden_layers=1).to(dtype)
    captured = capture(copy.deepcopy(model))
    with torch.no_grad():
        # the same rounded weights, without bfloat16's rounding of every result
        expected = model.float()(torch.tensor([tokens])).logits[0].numpy()
    _, session = session_of(captured, tmp_path / "out")
    (logits,) = session.prefill(session.new_state(1, 20, 0), [tokens], all_logits=True)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_different_length_decode_as_they_do_alone(family: str, plain: Plain) -> None:
    program, session = plain(family)
    rows = [_tokens(33, 1), _tokens(5, 2), _tokens(1, 3)]
    state = session.new_state(3, 33, 4)
    session.prefill(state, rows)
    together = [session.decode(state, np.array([7, 8, 9])) for _ in range(4)]
    judge = TorchSession(program)
    for index, row in enumerate(rows):
        alone = judge.new_state(1)
        judge.prefill(alone, [row])
        for step in together:
            np.testing.assert_allclose(
                step[index], judge.decode(alone, np.array([7 + index]))[0], atol=TOLERANCE
            )


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_forward_agrees_with_the_model_at_another_batch_size(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    inputs = example_inputs(family, batch=3)
    if family == "bert":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 7:] = 0
    with torch.no_grad():
        result = model(**inputs)
    expected = result if isinstance(result, torch.Tensor) else result[0]
    _, session = session_of(captured_tiny(family), tmp_path / "out")
    got = session.forward({name: value.numpy() for name, value in inputs.items()})
    first = next(iter(got.values()))
    keep = inputs["attention_mask"].bool().numpy() if family == "bert" else ...
    np.testing.assert_allclose(first[keep], expected.numpy()[keep], atol=TOLERANCE)


def test_a_decode_step_copies_no_cache(plain: Plain) -> None:
    _, session = plain("llama")
    state = session.new_state(1, 8, 4)
    session.prefill(state, [_tokens(8)])
    before = [caches.key.row(0).copy() for caches in state.caches]
    memory = [caches.key.row(0).ctypes.data for caches in state.caches]
    session.decode(state, np.array([5]))
    for caches, old, place in zip(state.caches, before, memory, strict=True):
        new = caches.key.row(0)
        assert new.ctypes.data == place
        # slot 8 of that very memory was written, the others were left alone
        assert np.abs(new[:, 8]).min() > 0
        np.testing.assert_array_equal(np.delete(new, 8, axis=1), np.delete(old, 8, axis=1))


@pytest.mark.slow
def test_smollm2_agrees_with_the_torch_program(
    smollm2: Callable[..., Captured], book: str, tmp_path: Path
) -> None:
    captured = smollm2()
    program, session = session_of(captured, tmp_path / "out", chunk_tokens=512)
    tokens = captured.tokenizer.encode(book[:4000])[:600]
    judge = TorchSession(program)
    expected_state, state = judge.new_state(1), session.new_state(1, 600, 16)
    (expected,) = judge.prefill(expected_state, [tokens], all_logits=True)
    (got,) = session.prefill(state, [tokens], all_logits=True)
    # logits reach 32: this is seven digits of float32, over 30 layers
    np.testing.assert_allclose(got, expected, atol=2e-3)
    for _ in range(16):
        token = int(expected[-1].argmax())
        assert token == int(got[-1].argmax())
        expected, got = (
            judge.decode(expected_state, np.array([token])),
            session.decode(state, np.array([token])),
        )
        np.testing.assert_allclose(got, expected, atol=2e-3)
