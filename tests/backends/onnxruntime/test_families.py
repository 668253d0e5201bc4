"""Every family's tiny model, lowered, gives what the model gives: prefill in chunks, then token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from memcompile.backends.torch import TorchSession
from memcompile.frontend import capture
from memcompile.program import build_program
from tests.backends.onnxruntime.build import artifact_of, session_of
from tests.backends.onnxruntime.conftest import Plain
from tests.models import CAUSAL_FAMILIES, OTHER_FAMILIES, captured_tiny, example_inputs, tiny_model

TOLERANCE = 5e-5  # float32 sums in another order, logits of size 1


def _tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(t) for t in torch.randint(3, 128, (count,), generator=generator)]


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_step_agrees_with_the_model_over_chunks_and_single_tokens(family: str, plain: Plain) -> None:
    model = tiny_model(family)
    tokens = _tokens(50)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    _, session = plain(family)
    state = session.new_state(1, 41, 9)
    (logits,) = session.prefill(state, [tokens[:41]], all_logits=True)
    np.testing.assert_allclose(logits, expected[:41], atol=TOLERANCE)
    for index in range(41, 50):
        given = session.decode(state, np.array([tokens[index]]))
        np.testing.assert_allclose(given[0], expected[index], atol=TOLERANCE)


def test_doubles_are_computed_in_float32(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1).double()
    tokens = _tokens(20)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    _, session = session_of(capture(model), tmp_path / "out")
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


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "phi3"])
def test_no_transpose_is_left_around_attention(family: str, plain: Plain) -> None:
    program, session = plain(family)
    graph = onnx.load(str(session.artifact.path / "model.onnx"), load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert not {"Transpose", "Reshape"} & set(operators)
    assert operators.count("GroupQueryAttention") == len(program.states)
    # two norms a layer; the first has nothing before it to be joined with, the last sees chosen rows only
    assert operators.count("SkipSimplifiedLayerNormalization") == 2 * len(program.states) - 1


def test_weights_stand_once_on_disk_outside_the_graph(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=1)
    out = artifact_of(build_program(capture(model)), tmp_path / "out")
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (out / "weights.bin").stat().st_size <= parameters + 4096 * len(list(model.parameters()))
    external = onnx.load(str(out / "model.onnx"), load_external_data=False).graph.initializer
    assert all(t.external_data or len(t.raw_data) < 4096 for t in external)
