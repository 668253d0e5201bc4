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
from memcompile.backends.onnxruntime import backend
from memcompile.backends.onnxruntime.cuda_attention import cuda_attention, for_cuda, local_window
from memcompile.backends.onnxruntime.export import to_model, write
from memcompile.backends.onnxruntime.finish import (
    PATTERN,
    attention_nodes,
    group_query_attention,
    replace_attention,
)
from memcompile.backends.torch import TorchSession
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.lowering import get_backend
from memcompile.program import Program, build_program
from memcompile.progress import SILENT
from memcompile.rewrite.manager import apply
from memcompile.runtime import Session, load
from tests.backends.onnxruntime.build import artifact_of, session_of
from tests.backends.onnxruntime.driver import open_session
from tests.backends.onnxruntime.test_attention import Case, _graph, _run, _Traced
from tests.models import captured_tiny, tiny_model
from tests.rewrite.tiny import entry

# inputs of GroupQueryAttention (ONNX Runtime's operator documentation)
SLOTS, BIAS, K_SCALE, V_SCALE = 6, 10, 12, 13


CASES = {
    "dense": Case(),
    "window": Case(attributes={"window": 9, "softcap": 2.0}),
    "sinks": Case(attributes={"window": 9, "sinks": 3}),
    "strided blocks": Case(attributes={"window": 9, "block": 8, "stride": 3}),
    "int8": Case(attributes={"bits": 8}),
    "int8 window": Case(attributes={"bits": 8, "window": 9}),
    "int8 sinks": Case(attributes={"bits": 8, "window": 9, "sinks": 3}),
}


@functools.cache
def traced(
    name: str, dtype: str = "float16", *, mask: bool = False
) -> tuple[ir.Model, list[TensorEntry], list[TensorEntry]]:
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
    if mask:
        entries.append(TensorEntry("mask", "bool", ("batch", 1, "tokens", "slots")))
        node = next(n for n in graph.graph.nodes if n.target is torch.ops.memcompile.attention.default)
        with graph.graph.inserting_before(node):
            node.kwargs = {**node.kwargs, "mask": graph.graph.placeholder("mask")}
        graph.recompile()
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
    return replace_attention(model, lambda node: group_query_attention(node, local_window=local_window(node)))


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


@pytest.mark.parametrize("name", ["sinks", "strided blocks"])
def test_sinks_and_strided_blocks_stay_a_bias_in_the_type_of_the_queries(name: str) -> None:
    node = attention_of(for_cuda(traced(name)[0]))
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


def test_refuses_float32_because_the_provider_has_no_such_kernel() -> None:
    with pytest.raises(MemcompileError, match="no GroupQueryAttention in float, only in float16") as refused:
        for_cuda(traced("window", "float32")[0])
    assert refused.value.code == "MC116"
    assert "model.dtype to float16" in str(refused.value)


@pytest.mark.parametrize(("name", "mask"), [("int8 sinks", False), ("int8", True), ("int8 window", True)])
def test_refuses_a_bias_over_a_quantised_cache(name: str, mask: bool) -> None:
    model, _, _ = traced(name, mask=mask)
    with pytest.raises(MemcompileError, match="no sinks, strided blocks or mask over") as refused:
        for_cuda(model)
    assert refused.value.code == "MC116"


def test_refuses_keys_that_are_chosen_at_run_time() -> None:
    inputs: list[ir.Value | None] = [None] * (PATTERN + 1)
    inputs[0] = ir.Value(name="q", type=ir.TensorType(ir.DataType.FLOAT16))
    inputs[PATTERN] = ir.Value(name="pattern", type=ir.TensorType(ir.DataType.INT32))
    node = ir.Node("memcompile", "Attention", inputs, [ir.AttrString("region", "3")], num_outputs=3)
    with pytest.raises(MemcompileError, match="no operator that chooses the keys of a prompt") as refused:
        cuda_attention(node)
    assert refused.value.code == "MC116"
    assert refused.value.where == "attention region 3"


def test_a_run_time_mask_is_never_taken_for_a_window() -> None:
    model, _, _ = traced("window", mask=True)
    assert local_window(attention_nodes(model)[0]) == 0
    assert attention_of(for_cuda(model)).inputs[BIAS] is not None


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


def test_a_windowed_artifact_drops_old_tokens_and_keeps_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = captured_tiny("llama", num_hidden_layers=2)
    apply(captured.graph, [entry("attention.static", window_tokens=8, sink_tokens=0)])
    monkeypatch.setattr(backend, "portable", with_window_attribute)
    monkeypatch.setattr(backend, "with_kernels", lambda model, _: with_window_attribute(model))
    program, session = session_of(captured, tmp_path / "out")
    nodes = [n for n in ir.load(tmp_path / "out" / "model.onnx").graph if n.op_type == "GroupQueryAttention"]
    assert [n.attributes.get_int("local_window_size", 0) for n in nodes] == [8, 8]
    # far beyond the slots that the cache has: it is compacted on the way
    assert_agree(program, session, new_tokens=90, atol=5e-5)


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
    captured = capture(tiny_model("llama", num_hidden_layers=2).half())
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
    assert_agree(half_program, load(path, threads=1, provider="cpu"), new_tokens=8, atol=2e-3)


@pytest.mark.needs_gpu
def test_on_the_device_artifact_and_torch_program_agree(half_program: Program, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    path = artifact_of(half_program, tmp_path / "out", device="cuda")
    assert_agree(half_program, load(path, threads=1, provider="cuda"), new_tokens=20, atol=2e-2)
