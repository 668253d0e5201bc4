"""Opening a session, and inputs that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from memcompile.artifact import ArtifactWriter, FunctionEntry, Manifest, ModelEntry, TensorEntry
from memcompile.errors import MemcompileError
from memcompile.runtime import load
from memcompile.runtime.cache import State
from memcompile.runtime.session import Session
from tests.runtime.conftest import OpenTiny
from tests.runtime.test_split_law import assert_near, tokens_of
from tests.runtime.tiny_artifact import Layer, TinyModel, reference, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("session") / "tiny", TinyModel())


def test_threads_are_the_manifests_unless_given(tiny: Path) -> None:
    assert load(tiny).threads == 1
    assert load(str(tiny), threads=2).threads == 2


def test_refuses_an_unknown_provider(tiny: Path) -> None:
    with pytest.raises(MemcompileError, match="MC112 unknown provider 'tpu'") as caught:
        load(tiny, provider="tpu")
    assert caught.value.fix == "use one of cpu, cuda"


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="needs no CUDA")
def test_refuses_a_provider_that_is_not_there(tiny: Path) -> None:
    with pytest.raises(
        MemcompileError, match="MC511 provider 'cuda' is not available: this ONNX Runtime has"
    ):
        load(tiny, provider="cuda")


def test_refuses_a_provider_that_silently_fell_back(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: opened(path, options, providers[1:])
    )
    with pytest.raises(MemcompileError, match=r"MC511 .*ONNX Runtime fell back to CPUExecutionProvider"):
        load(tiny, provider="cuda")


def test_refuses_another_backend(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "out", TinyModel(), backend="other")
    with pytest.raises(
        MemcompileError, match="MC112 the artifact is for backend 'other', this runtime runs onnxruntime, tvm"
    ):
        load(path)


def test_refuses_a_graph_with_other_inputs_than_listed(tmp_path: Path) -> None:
    model = TinyModel()
    path = write_tiny(tmp_path / "out", model)
    data = json.loads((path / "manifest.json").read_text())
    listed = data["functions"]["step"]["inputs"]
    listed.append({"name": "extra", "dtype": "int64", "dims": []})
    (path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(
        MemcompileError, match=r"MC505 functions.step lists inputs that the graph does not have: extra"
    ):
        load(path)
    del listed[0], listed[-1]
    (path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(MemcompileError, match=r"MC505 .* not the inputs that the graph needs: input_ids"):
        load(path)


def test_refuses_a_graph_that_is_none(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        (writer.path / "model.onnx").write_bytes(b"no graph")
        entry = FunctionEntry("model.onnx", (), ())
        writer.seal(Manifest("onnxruntime", ModelEntry("none"), {"forward": entry}))
        path = writer.commit()
    with pytest.raises(MemcompileError, match=r"MC505 ONNX Runtime .* does not load model.onnx"):
        load(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[]], r"MC131 the prompt is empty \(0 tokens\)"),
        ([list(range(10)) * 30], "MC130 300 tokens are more than the model's 256 positions"),
        ([[1] * 51], "MC120 the prompt has 51 tokens, the state was made for 50"),
        ([[1], [2]], "MC120 2 prompts for a state of 1 rows"),
        ([[61]], r"MC120 the prompt has token ids outside 0\.\.60"),
        ([[-1]], r"MC120 the prompt has token ids outside 0\.\.60"),
    ],
)
def test_refuses_prompts_that_do_not_fit(open_tiny: OpenTiny, rows: list[list[int]], message: str) -> None:
    session = open_tiny(TinyModel())
    with pytest.raises(MemcompileError, match=message):
        session.prefill(session.new_state(1, 50, 5), rows)


def test_the_last_position_can_be_used_and_none_after_it(open_tiny: OpenTiny) -> None:
    model = TinyModel()
    session = open_tiny(model)
    tokens = tokens_of(model, 256)
    state = session.new_state(1, 255, 5)
    session.prefill(state, [tokens[:255]])
    assert_near(session.decode(state, tokens[255:])[0], reference(model, tokens)[255])
    with pytest.raises(MemcompileError, match="MC130 257 tokens are more than the model's 256 positions"):
        session.decode(state, [1])
    with pytest.raises(MemcompileError, match="MC130 257 tokens are more"):
        session.new_state(1, 257, 0)


def test_refuses_sizes_and_shapes_that_make_no_sense(open_tiny: OpenTiny) -> None:
    session = open_tiny(TinyModel())
    with pytest.raises(MemcompileError, match="MC120 batch is 0, it must be at least 1"):
        session.new_state(0, 1, 1)
    state = session.new_state(2, 3, 3)
    session.prefill(state, [[1], [2]])
    with pytest.raises(MemcompileError, match=r"MC120 decode needs 2 tokens, one a row; got shape \(1,\)"):
        session.decode(state, [1])
    with pytest.raises(MemcompileError, match="MC120 extend needs a state of one row, this one has 2"):
        session.extend(state, [1])
    with pytest.raises(MemcompileError, match="MC120 the artifact has no function 'forward', only step"):
        session.forward({})
    with pytest.raises(MemcompileError, match="MC506 the artifact has no tokenizer"):
        _ = session.tokenizer


def encoder(path: Path) -> Session:
    """A model that is not causal: y = x + b."""
    inputs = (TensorEntry("x", "float32", ("B", "T", 3)), TensorEntry("b", "float32", ("B", "T", 3)))
    outputs = (TensorEntry("y", "float32", ("B", "T", 3)),)
    infos = [
        helper.make_tensor_value_info(e.name, TensorProto.FLOAT, list(e.dims)) for e in (*inputs, *outputs)
    ]
    graph = helper.make_graph([helper.make_node("Add", ["x", "b"], ["y"])], "g", infos[:2], infos[2:])
    with ArtifactWriter(path) as writer:
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save_model(made, str(writer.path / "model.onnx"))
        function = FunctionEntry("model.onnx", inputs, outputs)
        writer.seal(
            Manifest("onnxruntime", ModelEntry("bert", causal=False), {"forward": function}, threads=1)
        )
        return load(writer.commit())


def test_forward_runs_and_names_its_outputs(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    got = encoder(tmp_path / "out").forward({"x": x[:, ::-1], "b": x})
    np.testing.assert_array_equal(got["y"], x[:, ::-1] + x)


X = np.zeros((1, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": X}, "the inputs do not fit: missing 'b'"),
        ({"x": X, "b": X, "c": X}, "the inputs do not fit: unknown 'c'"),
        ({"x": X.astype(np.float64), "b": X}, "x is float64, it must be float32"),
        ({"x": X[0], "b": X}, r"x has shape \[4, 3\], it must be \[B, T, 3\]"),
        ({"x": X[..., :2], "b": X}, r"x has size 2 in dim 2, it must be 3 \(\[B, T, 3\]\)"),
        ({"x": X, "b": X[:, :2]}, "b has T = 2 in dim 1, but x has T = 4"),
    ],
)
def test_forward_refuses_inputs_that_do_not_fit(tmp_path: Path, feeds: dict[str, Any], message: str) -> None:
    session = encoder(tmp_path / "out")
    with pytest.raises(MemcompileError, match=f"MC120 {message}") as caught:
        session.forward(feeds)
    assert "the inputs are: x float32 [B, T, 3]; b float32" in str(caught.value.fix)
    with pytest.raises(MemcompileError, match="MC120 the artifact has no function 'step', only forward"):
        session.new_state(1, 1, 1)


@pytest.mark.parametrize(
    "layers",
    [
        (Layer(window=10, sinks=3), Layer()),
        (Layer(keep_tokens=12, bits=8), Layer(window=10, sinks=3, bits=8)),
    ],
)
def test_device_buffers_do_what_host_buffers_do(
    open_tiny: OpenTiny, layers: tuple[Layer, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path for memory that numpy cannot reach, run on memory that it can."""
    from memcompile.runtime import buffers, cache

    model = TinyModel(layers=layers)
    session = open_tiny(model)
    tokens = [tokens_of(model, n + 20, seed=n) for n in (50, 20)]

    def run() -> tuple[State, np.ndarray]:
        state = session.new_state(2, 50, 20)
        first = session.prefill(state, [t[:-20] for t in tokens])
        session.compress(state)
        steps = [session.decode(state, [t[i - 20] for t in tokens]) for i in range(20)]
        return state, np.concatenate([np.stack(first)[:, 0], *steps])

    host_state, host = run()
    monkeypatch.setattr(
        cache, "new_buffer", lambda shape, dtype, device: buffers.DeviceBuffer(shape, dtype, "cpu")
    )
    device_state, device = run()
    assert isinstance(device_state.caches[0].key, buffers.DeviceBuffer)
    assert device_state.nbytes == host_state.nbytes
    np.testing.assert_array_equal(device, host)
