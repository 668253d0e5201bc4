"""Quantised weights, lowered: the operators against their definitions, and a whole model against torch."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import fx

from memcompile.artifact import TensorEntry
from memcompile.backends.onnxruntime import backend as _register  # noqa: F401
from memcompile.backends.onnxruntime.backend import OnnxRuntimeBackend
from memcompile.backends.onnxruntime.emitter import Emitter
from memcompile.backends.onnxruntime.export import to_model, write
from memcompile.backends.onnxruntime.finish import portable, with_kernels
from memcompile.backends.torch import TorchSession
from memcompile.dialect import DIALECT
from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.program import build_program
from memcompile.rewrite.manager import apply
from tests.backends.onnxruntime.driver import StepDriver, open_session
from tests.dialect.test_quantized import FORMATS, arguments, codes_of
from tests.models import captured_tiny
from tests.rewrite.tiny import entry

SIZES = (1, 63, 64, 65, 200)


class _Operator(torch.nn.Module):
    """One dialect operator over stored codes, run as the emitter lowers it."""

    def __init__(self, name: str, weight: Any, *rest: Any, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        graph = fx.Graph()
        root = torch.nn.Module()
        x = graph.placeholder("x")
        tensors = dict(
            zip(("codes", "scales", "zero_points", "offsets", "table"), arguments(weight), strict=True)
        )
        tensors |= {"bias": bias} if name == "quantized_linear" else {}
        operands: list[Any] = [x]
        for key, tensor in tensors.items():
            if tensor is None:
                operands.append(None)
            else:
                root.register_buffer(key, tensor)
                operands.append(graph.get_attr(key))
        graph.output(graph.call_function(DIALECT[name].target, (*operands, *rest)))
        self.graph_module = fx.GraphModule(root, graph)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (Emitter(self.graph_module).run(*inputs),)


# as it is finished for every ONNX Runtime, and for ours
FINISHES = {"portable": portable, "kernels": lambda model: with_kernels(model, lambda _: True)}


Traced = tuple[ir.Model, list[TensorEntry], list[TensorEntry]]


def traced(operator: _Operator, example: torch.Tensor, dims: tuple[int | str, ...]) -> Traced:
    """The model of one operator and its interface."""
    inputs = [TensorEntry("x", str(example.dtype).removeprefix("torch."), dims)]
    outputs = [TensorEntry("result", "float32", ("d0", "d1", "d2"))]
    return to_model(operator, inputs, outputs, [example]), inputs, outputs


@functools.cache
def product(
    width: int, with_bias: bool, int8_activations: bool, **values: Any
) -> tuple[QuantizedWeight, torch.Tensor | None, Traced]:
    """A weight with 24 rows, its bias or none, and the traced product with them."""
    weight = codes_of(24, width, **values)
    bias = torch.randn(24) if with_bias else None
    operator = _Operator("quantized_linear", weight, weight.bits, int8_activations, bias=bias)
    return weight, bias, traced(operator, torch.randn(2, 5, width), ("batch", "tokens", width))


def opened(traced: Traced, folder: Path, finish: str = "portable") -> Any:
    """The finished model as a function of a tensor."""
    model, inputs, outputs = traced
    write(FINISHES[finish](model), folder / "model.onnx", inputs, outputs)
    session = open_session(folder / "model.onnx")
    return lambda x: session.run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_the_product_equals_the_definition(
    format_: dict[str, Any], finish: str, width: int, tmp_path: Path
) -> None:
    weight, bias, model = product(width, True, False, **format_)
    assert bias is not None
    run = opened(model, tmp_path, finish)
    for tokens in SIZES:
        x = torch.randn(1, tokens, width)
        expected = DIALECT["quantized_linear"].definition(
            x.double(), *arguments(weight), bias.double(), weight.bits, False
        )
        np.testing.assert_allclose(run(x), expected.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("finish", FINISHES)
def test_int8_activations_are_those_of_the_definition(
    finish: str, zero_points: bool, bits: int, width: int, tmp_path: Path
) -> None:
    weight, _, model = product(width, False, True, bits=bits, block=32, zero_points=zero_points)
    run = opened(model, tmp_path, finish)
    for tokens in SIZES:
        x = torch.randn(1, tokens, width)
        rounded, exact = (
            DIALECT["quantized_linear"].definition(x.double(), *arguments(weight), None, bits, int8).numpy()
            for int8 in (True, False)
        )
        found, size = run(x), float(np.abs(exact).max())
        # a kernel may break ties of rounding otherwise; still it is the same rounding, not just a close one
        assert np.abs(found - rounded).mean() < 0.3 * np.abs(rounded - exact).mean()
        np.testing.assert_allclose(found, rounded, atol=0.01 * size, rtol=0)


@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_rows_equal_the_definition(format_: dict[str, Any], width: int, tmp_path: Path) -> None:
    weight = codes_of(50, width, **format_)
    operator = _Operator("quantized_embedding", weight, weight.bits, width, torch.float32)
    indices = torch.randint(0, 50, (2, 5))
    run = opened(traced(operator, indices, ("batch", "tokens")), tmp_path)
    for tokens in SIZES:
        indices = torch.randint(0, 50, (1, tokens))
        expected = DIALECT["quantized_embedding"].definition(
            indices, *arguments(weight), weight.bits, width, torch.float64
        )
        np.testing.assert_allclose(run(indices), expected.numpy(), rtol=1e-5, atol=1e-4)


def lower(folder: Path, **values: Any) -> TorchSession:
    captured = captured_tiny("llama", tie_word_embeddings=True, hidden_size=64, vocab_size=1000)
    apply(captured.graph, [entry("weights.quantize", **values)])
    program = build_program(captured)
    OnnxRuntimeBackend().lower(program, folder, device="cpu", progress=lambda _: None)
    return TorchSession(program)


def step(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of all tokens of a prompt, through the lowered step graph and empty caches."""
    session = open_session(folder / "model.onnx")
    count = len(ids)
    feeds: dict[str, np.ndarray] = {}
    for spec in session.get_inputs():
        if spec.name == "input_ids":
            feeds[spec.name] = np.array([ids])
        elif spec.name in ("position_ids", "logit_positions"):
            feeds[spec.name] = np.arange(count)[None]
        elif spec.name == "attention_mask":
            feeds[spec.name] = np.ones((1, count), np.int64)
        else:
            feeds[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    logits: np.ndarray = session.run(["logits"], feeds)[0][0]
    return logits


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 8, "activations": "float"},
        {"bits": 4, "zero_point": "integer", "activations": "float"},
        {"bits": 4, "zero_point": "float", "activations": "float", "block_size": 16},
        {"bits": 4, "zero_point": "integer", "activations": "float", "block_size": 128},
    ],
    ids=str,
)
def test_a_quantised_model_equals_the_torch_program(values: dict[str, Any], tmp_path: Path) -> None:
    torch_session = lower(tmp_path, **values)
    ids = list(range(5, 40))
    expected = torch_session.prefill(torch_session.new_state(1), [ids], all_logits=True)[0]
    np.testing.assert_allclose(step(tmp_path, ids), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_with_int8_activations_it_stays_close_to_the_torch_program(bits: int, tmp_path: Path) -> None:
    torch_session = lower(tmp_path, bits=bits)
    ids = list(range(5, 40))
    expected = torch_session.prefill(torch_session.new_state(1), [ids], all_logits=True)[0]
    found = step(tmp_path, ids)
    # a value between two int8 steps may round either way in either program
    assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).max()


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    lower(tmp_path, bits=8)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places: dict[tuple[str, str], list[str]] = {}
    for tensor in model.graph.initializer:
        external = {item.key: item.value for item in tensor.external_data}
        if external:
            places.setdefault((external["offset"], external["length"]), []).append(tensor.name)
    shared = [names for names in places.values() if len(names) > 1]
    assert len(shared) == 1
    assert len(shared[0]) == 2
    length = sum(int(length) for _, length in places)
    assert (tmp_path / "weights.bin").stat().st_size == length
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MatMulNBits") == 15
    assert operators.count("GatherBlockQuantized") == 1
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["type"] == "decoder"


@pytest.mark.parametrize("bits", [3, 4])
def test_tables_are_multiplied_by_the_kernel_graph_and_written_out_in_the_portable_one(
    bits: int, tmp_path: Path
) -> None:
    captured = captured_tiny("llama", tie_word_embeddings=True, hidden_size=64, vocab_size=1000)
    apply(captured.graph, [entry("weights.quantize", bits=bits, method="kmeans", activations="float")])
    program = build_program(captured)
    lowered = OnnxRuntimeBackend().lower(program, tmp_path, device="cpu", progress=lambda _: None)
    function, judge, ids = lowered.functions["step"], TorchSession(program), list(range(5, 40))
    expected = judge.prefill(judge.new_state(1), [ids], all_logits=True)[0]
    assert function.kernel_file is not None
    operators = {}
    for file in (function.file, function.kernel_file):
        one = replace(lowered, functions={"step": replace(function, file=file)})
        found = StepDriver(tmp_path, one, 64).step(ids, list(range(len(ids))))
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
        nodes = onnx.load(tmp_path / file, load_external_data=False).graph.node
        operators[file] = [node.op_type for node in nodes]
    assert operators[function.kernel_file].count("QuantizedLinear") == 15
    assert not {"QuantizedLinear", "MatMulNBits"} & set(operators[function.file])
