"""Attention finished for ONNX Runtime's CUDA provider: its attributes, and on the CPU what they mean."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from memcompile.artifact import TensorEntry
from memcompile.backends.onnxruntime import backend as _register  # noqa: F401
from memcompile.backends.onnxruntime.cuda_attention import cuda_attention, for_cuda, local_window
from memcompile.backends.onnxruntime.export import to_model, write
from memcompile.backends.onnxruntime.finish import BIAS as TRACED_BIAS
from memcompile.backends.onnxruntime.finish import (
    PATTERN,
    finish,
    group_query_attention,
)
from memcompile.backends.onnxruntime.products import runtime_products
from memcompile.backends.torch import TorchSession
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.lowering import get_backend
from memcompile.program import Program, build_program
from memcompile.progress import SILENT
from memcompile.rewrite.manager import apply
from memcompile.runtime import Session, load
from tests.backends.onnxruntime.build import artifact_of
from tests.backends.onnxruntime.driver import open_session
from tests.backends.onnxruntime.test_attention import Case, _graph, _run, _Traced
from tests.models import tiny_model
from tests.rewrite.tiny import entry

# inputs of GroupQueryAttention (ONNX Runtime's operator documentation)
SLOTS, BIAS, K_SCALE, V_SCALE = 6, 10, 12, 13


CASES = {
    "dense": Case(),
    "window": Case(attributes={"window": 9, "softcap": 2.0}),
    "sinks": Case(attributes={"window": 9, "sinks": 3}),
    "int8 window": Case(attributes={"bits": 8, "window": 9}),
}


@functools.cache
def traced(name: str, dtype: str = "float16") -> tuple[ir.Model, list[TensorEntry], list[TensorEntry]]:
    """The traced model of one attention node, and its interface."""
    case = CASES[name]
    cached = {0: dtype, 8: "int8", 4: "uint8"}[case.bits]
    cache = ("batch", case.kv_heads, "capacity", case.stored)
    entries = [
        TensorEntry("q", dtype, ("batch", case.heads, "tokens", case.width)),
        TensorEntry("k", dtype, ("batch", case.kv_heads, "tokens", case.width)),
        TensorEntry("v", dtype, ("batch", case.kv_heads, "tokens", case.width)),
        TensorEntry("past_k", cached, cache),
        TensorEntry("past_v", cached, cache),
        TensorEntry("positions", "int64", ("batch", "slots")),
    ]
    outputs = [
        TensorEntry("out", dtype, ("batch", case.heads, "tokens", case.width)),
        TensorEntry("present_k", cached, cache),
        TensorEntry("present_v", cached, cache),
    ]
    sizes = {"batch": 2, "tokens": 5, "capacity": 21, "slots": 11}
    graph = _graph(case, torch.full((case.kv_heads * case.width,), 0.03))
    examples = [
        torch.zeros([d if isinstance(d, int) else sizes[d] for d in e.dims], dtype=getattr(torch, e.dtype))
        for e in entries
    ]
    return to_model(_Traced(graph), entries, outputs, examples), entries, outputs


def attention_of(model: ir.Model) -> ir.Node:
    """The one GroupQueryAttention of a model."""
    (node,) = (n for n in model.graph if n.op_type == "GroupQueryAttention")
    return node


def with_window_attribute(model: ir.Model) -> ir.Model:
    """`for_cuda` in float32, which the CPU provider has and the CUDA provider lacks."""
    return finish(
        model,
        lambda node: group_query_attention(node, local_window=local_window(node)),
        runtime_products,
    )


def operators_of(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def test_dense_attention_has_no_window_and_no_bias() -> None:
    node = attention_of(for_cuda(traced("dense")[0]))
    assert "local_window_size" not in node.attributes
    assert len(node.inputs) == SLOTS + 1
    assert node.domain == "com.microsoft"


def test_a_window_is_an_attribute_and_its_bias_is_gone() -> None:
    model = for_cuda(traced("window")[0])
    node = attention_of(model)
    assert node.attributes.get_int("local_window_size") == 9
    assert node.attributes.get_float("softcap") == 2.0
    assert len(node.inputs) == SLOTS + 1
    assert "Where" not in operators_of(model)


def test_sinks_stay_a_bias_in_the_type_of_the_queries() -> None:
    node = attention_of(for_cuda(traced("sinks")[0]))
    assert "local_window_size" not in node.attributes
    bias, query = node.inputs[BIAS], node.inputs[0]
    assert bias is not None
    assert query is not None
    # the kernel refuses a bias of another type
    assert bias.dtype == query.dtype == ir.DataType.FLOAT16


def test_an_int8_cache_keeps_its_scales_beside_a_window() -> None:
    node = attention_of(for_cuda(traced("int8 window")[0]))
    assert node.attributes.get_int("local_window_size") == 9
    assert node.attributes.get_int("kv_cache_bit_width") == 8
    kinds = [node.attributes.get_string(f"{name}_quant_type") for name in "kv"]
    assert kinds == ["PER_CHANNEL", "PER_CHANNEL"]
    assert node.inputs[BIAS] is None
    assert [node.inputs[i].dtype for i in (K_SCALE, V_SCALE)] == [ir.DataType.FLOAT] * 2  # type: ignore[union-attr]


def node_of(
    dtype: ir.DataType = ir.DataType.FLOAT16, inputs: tuple[int, ...] = (), **attributes: int
) -> ir.Node:
    """A traced node with queries of a type, and something at each of `inputs`."""
    values: list[ir.Value | None] = [None] * 12
    values[0] = ir.Value(name="q", type=ir.TensorType(dtype))
    for index in inputs:
        values[index] = ir.Value(name=f"input_{index}")
    given = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    given += [ir.AttrInt64("num_heads", 4), ir.AttrInt64("kv_num_heads", 2), ir.AttrFloat32("scale", 0.25)]
    return ir.Node("memcompile", "Attention", values, [*given, ir.AttrString("region", "3")], num_outputs=3)


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"window": 9, "causal": 1}, 9),
        ({"window": 9, "causal": 1, "sinks": 3}, 0),
        ({"window": 9, "causal": 1, "block": 8, "stride": 3}, 0),
        ({"window": 9, "causal": 1, "masked": 1}, 0),
        ({"window": 9, "causal": 0}, 0),
        ({"window": 0, "causal": 1}, 0),
    ],
    ids=["plain", "sinks", "strided blocks", "mask", "both sides", "none"],
)
def test_only_a_plain_causal_window_is_the_attribute(attributes: dict[str, int], window: int) -> None:
    node = node_of(inputs=(TRACED_BIAS,), **attributes)
    assert local_window(node) == window
    made = cuda_attention(node)
    assert made.attributes.get_int("local_window_size", 0) == window
    assert (len(made.inputs) > BIAS) == (window == 0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (node_of(ir.DataType.FLOAT), "no GroupQueryAttention in float, only in float16"),
        (node_of(inputs=(PATTERN,)), "no operator that chooses the keys of a prompt"),
        (
            node_of(inputs=(TRACED_BIAS,), bits=8, window=9, causal=1, sinks=3),
            "no sinks, strided blocks or mask over a quantised cache",
        ),
        (
            node_of(inputs=(TRACED_BIAS,), bits=4, window=9, causal=1, block=8, stride=3),
            "no sinks, strided blocks or mask over a quantised cache",
        ),
        (
            node_of(inputs=(TRACED_BIAS,), bits=8, masked=1),
            "no sinks, strided blocks or mask over a quantised cache",
        ),
    ],
    ids=["float32", "chosen keys", "sinks over int8", "strided blocks over int4", "mask over int8"],
)
def test_refuses_what_the_cuda_kernel_lacks(node: ir.Node, message: str) -> None:
    with pytest.raises(MemcompileError, match=message) as refused:
        cuda_attention(node)
    assert refused.value.code == "MC116"
    assert refused.value.where == "attention region 3"
    assert refused.value.fix


def test_the_portable_graph_is_not_changed_by_finishing_for_cuda() -> None:
    model, _, _ = traced("window")
    before = [node.op_type for node in model.graph]
    for_cuda(model)
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize("name", ["window", "int8 window"])
def test_the_window_attribute_means_the_window_of_the_definition(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, entries, outputs = traced(name, "float32")
    finished = with_window_attribute(model)
    assert attention_of(finished).attributes.get_int("local_window_size") == 9
    write(finished, tmp_path / "model.onnx", entries, outputs)
    session = open_session(tmp_path / "model.onnx")
    scale = torch.full((case.kv_heads * case.width,), 0.03)
    dtype = torch.int8 if case.bits else torch.float32
    for first in (1, 63, 64, 65, 200):
        _run(session, case, scale, dtype, [first, 1, 7, 1])


def assert_agree(program: Program, session: Session, *, new_tokens: int, atol: float) -> None:
    """Prompts of two lengths, then single tokens: the artifact's logits are the torch program's."""
    generator = torch.Generator().manual_seed(0)
    rows = [[int(t) for t in torch.randint(3, 64, (count,), generator=generator)] for count in (150, 45)]
    judge = TorchSession(program)
    expected_state, state = judge.new_state(2, 150, new_tokens), session.new_state(2, 150, new_tokens)
    expected, got = judge.prefill(expected_state, rows), session.prefill(state, rows)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=atol)
    for token in range(new_tokens):
        tokens = np.array([3 + token % 50, 5 + token % 40])
        wanted = judge.decode(expected_state, tokens)
        np.testing.assert_allclose(session.decode(state, tokens), wanted, atol=atol)


@pytest.fixture(scope="module")
def half_program() -> Program:
    """A tiny model in float16 with a window on one layer and sinks on the other."""
    captured = capture(tiny_model("llama").half())
    apply(captured.graph, [
        entry("attention.static", window_tokens=8, sink_tokens=0, layers="0"),
        entry("attention.static", window_tokens=8, sink_tokens=2, layers="1"),
    ])  # fmt: skip
    return build_program(captured)


def test_an_artifact_for_cuda_is_half_precision_with_a_window_on_the_layer_that_has_one(
    half_program: Program, tmp_path: Path
) -> None:
    lowered = get_backend("onnxruntime").lower(half_program, tmp_path, device="cuda", progress=SILENT.stage)
    assert {state.dtype for state in lowered.states} == {"float16"}
    nodes = [n for n in ir.load(tmp_path / "model.onnx").graph if n.op_type == "GroupQueryAttention"]
    assert [n.attributes.get_int("local_window_size", 0) for n in nodes] == [8, 0]
    assert [len(n.inputs) > BIAS for n in nodes] == [False, True]
    # the kernel library is for CPUs
    assert lowered.functions["step"].kernels == ()


def test_the_artifact_for_cuda_computes_the_same_on_the_cpu_provider(
    half_program: Program, tmp_path: Path
) -> None:
    path = artifact_of(half_program, tmp_path / "out", device="cuda")
    # far beyond the slots of the windowed caches: they drop old tokens on the way
    assert_agree(half_program, load(path, threads=1, provider="cpu"), new_tokens=90, atol=2e-3)


@pytest.mark.needs_gpu
def test_on_the_device_artifact_and_torch_program_agree(half_program: Program, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    path = artifact_of(half_program, tmp_path / "out", device="cuda")
    assert_agree(half_program, load(path, threads=1, provider="cuda"), new_tokens=20, atol=2e-2)
