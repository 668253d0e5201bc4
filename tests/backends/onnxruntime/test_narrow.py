"""A model in bfloat16: weights stay as they are stored, kernels multiply by them, look-ups cast rows only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from memcompile.backends.onnxruntime.backend import KERNEL_MODEL, MODEL
from memcompile.frontend import capture
from memcompile.program import build_program
from memcompile.runtime import load, session
from tests.backends.onnxruntime.build import artifact_of, session_of
from tests.models import tiny_model

pytestmark = pytest.mark.xdist_group("narrow")

PROMPT, NEW = 70, 6
# smaller tensors are constants that the exporter folds
SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
SIZES |= {"head_dim": 32, "num_hidden_layers": 2}


def _operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that several tests look at."""
    out = tmp_path_factory.mktemp("narrow") / "out"
    session_of(capture(tiny_model("llama", **SIZES).bfloat16()), out)
    return out


def test_every_product_runs_on_the_weights_as_they_are_stored(folder: Path) -> None:
    portable, kernels = _operators(folder / MODEL), _operators(folder / KERNEL_MODEL)
    assert kernels["LinearBFloat16"] == portable["FusedMatMul"] == 15
    assert kernels["FusedMatMul"] == 0
    stored = onnx.load(folder / KERNEL_MODEL, load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in stored.initializer}
    weights = [node.input[1] for node in stored.node if node.op_type == "LinearBFloat16"]
    assert {types[name] for name in weights} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", [MODEL, KERNEL_MODEL])
def test_a_look_up_casts_only_the_rows_it_reads(folder: Path, name: str) -> None:
    graph = onnx.load(folder / name, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16}
    assert [node.op_type for node in graph.node if node.op_type == "Gather" and node.input[0] in stored]


def test_both_graphs_follow_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(3, 128, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # the same rounded weights, without rounding of what is computed
        expected = tiny_model("llama", **SIZES).bfloat16().float()(tokens).logits[0].numpy()
    size = np.abs(expected).max()
    # keys and values are rounded; by kernels also the inputs of products over many rows, and of attention
    for kernels, tolerance in ((True, 1e-2), (False, 5e-3)):
        if not kernels:
            monkeypatch.setattr(session, "find_library", lambda: None)
        opened = load(folder, threads=1)
        state = opened.new_state(1, PROMPT, NEW)
        (logits,) = opened.prefill(state, [tokens[0, :PROMPT].tolist()], all_logits=True)
        assert np.abs(logits - expected[:PROMPT]).max() < tolerance * size
        for place in range(PROMPT, PROMPT + NEW):
            given = opened.decode(state, tokens[0, place : place + 1].numpy())[0]
            assert np.abs(given - expected[place]).max() < tolerance * size


def test_keys_and_values_are_kept_in_the_models_type(folder: Path) -> None:
    state = load(folder, threads=1).new_state(1, PROMPT, NEW)
    kept = SIZES["num_hidden_layers"] * SIZES["num_key_value_heads"] * SIZES["head_dim"] * (PROMPT + NEW)
    assert state.nbytes == 2 * kept * 2
    assert _operators(folder / KERNEL_MODEL)["AttentionBFloat16"] == SIZES["num_hidden_layers"]
    # where the runtime's own operator reads it, it is widened and narrowed again
    assert _operators(folder / MODEL)["GroupQueryAttention"] == SIZES["num_hidden_layers"]
    # onnxruntime-genai has no such cache
    assert not (folder / "genai_config.json").exists()


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES, tie_word_embeddings=True).bfloat16()
    assert model.get_input_embeddings().weight is model.lm_head.weight
    artifact = artifact_of(build_program(capture(model)), tmp_path / "out")
    table = model.lm_head.weight
    held = sum(p.numel() for p in model.parameters()) * 2
    assert (artifact / "weights.bin").stat().st_size < held + table.numel() * 2
