"""ONNX Runtime's sparse operators: their structure against their schemas, and on the CPU what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from memcompile.artifact import TensorEntry
from memcompile.backends.onnxruntime.cuda_sparse import (
    block_lists,
    dynamic_sparse_attention,
    folded,
    sparse_attention,
    sparse_refusal,
)
from memcompile.backends.onnxruntime.export import write
from memcompile.backends.onnxruntime.finish import attention_nodes
from memcompile.dialect import attention_definition
from tests.backends.onnxruntime.driver import open_session
from tests.backends.onnxruntime.test_cuda_attention import CASES, traced

BLOCK = 64
CAPACITY = 256


def finished(
    name: str, dtype: str, extra: dict[str, tuple[int | str, ...]], make: Callable[..., list[ir.Node]]
) -> tuple[ir.Model, list[TensorEntry], list[TensorEntry]]:
    """A traced model whose attention is what `make(node, *extra inputs)` gives."""
    model, entries, outputs = traced(name, dtype)
    made = model.clone()
    (node,) = attention_nodes(made)
    added = [
        ir.Value(name=key, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(dims))
        for key, dims in extra.items()
    ]
    made.graph.inputs.extend(added)
    nodes = make(node, *added)
    made.graph.insert_before(node, nodes)
    by_name = {value.name: value for new in nodes for value in new.outputs if value.name}
    for old in node.outputs:
        old.replace_all_uses_with(by_name[old.name], replace_graph_outputs=True)
    made.graph.remove(node, safe=True)
    made.graph.opset_imports.pop("memcompile", None)
    return made, [*entries, *(TensorEntry(key, "int32", dims) for key, dims in extra.items())], outputs


def sparse(node: ir.Node, rows: ir.Value, columns: ir.Value) -> list[ir.Node]:
    return sparse_attention(node, rows, columns, block_tokens=BLOCK)


LISTS: dict[str, tuple[int | str, ...]] = {"rows": ("layouts", "begins"), "columns": ("layouts", "most")}
CHOICE: dict[str, tuple[int | str, ...]] = {"selected": ("queries", "most"), "counts": ("queries",)}


def by_schema(node: ir.Node) -> tuple[dict[str, str | None], set[str]]:
    """A node's input names by what its schema calls them, and its attributes; both must be the schema's."""
    (schema,) = (s for s in get_all_operator_schema() if s.name == node.op_type and s.domain == node.domain)
    attributes = set(node.attributes)
    assert attributes <= set(schema.attributes)
    assert {name for name, attribute in schema.attributes.items() if attribute.required} <= attributes
    taken = {
        formal.name: None if given is None else str(given.name)
        for formal, given in zip(schema.inputs, node.inputs, strict=False)
    }
    needed = [formal.name for formal in schema.inputs if formal.option == type(formal.option).Single]
    assert [name for name in needed if taken.get(name) is None] == []
    assert len(node.inputs) <= len(schema.inputs)
    return taken, attributes


def test_sparse_attention_is_built_as_its_schema_says() -> None:
    model, _, _ = finished("dense", "float16", LISTS, sparse)
    (node,) = (n for n in model.graph if n.op_type == "SparseAttention")
    taken, _ = by_schema(node)
    assert (taken["block_row_indices"], taken["block_col_indices"]) == ("rows", "columns")
    assert (taken["past_key"], taken["past_value"]) == ("past_k", "past_v")
    assert node.attributes.get_int("sparse_block_size") == BLOCK
    assert (node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")) == (4, 2)


def test_dynamic_sparse_attention_is_built_as_its_schema_says() -> None:
    model, _, _ = finished("dense", "float16", CHOICE, dynamic_sparse_attention)
    (node,) = (n for n in model.graph if n.op_type == "DynamicSparseAttention")
    taken, _ = by_schema(node)
    assert (taken["selected_indices"], taken["selected_counts"]) == ("selected", "counts")
    assert taken["auxiliary_key"] is None
    assert taken["auxiliary_value"] is None
    names = node.attributes
    # the combination that the kernel has for slots of the cache itself
    assert names.get_string("attention_mode") == "selected_only"
    assert names.get_string("selected_kv_source") == "main"
    assert names.get_int("is_causal") == 1
    assert (names.get_int("num_heads"), names.get_int("kv_num_heads")) == (2, 1)


def test_block_lists_are_those_of_the_operators_documentation() -> None:
    first = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    second = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    rows, columns = block_lists(np.array([first, second], bool))
    assert rows.tolist() == [[0, 1, 3, 5, 8], [0, 1, 3, 6, 9]]
    assert columns.tolist() == [[0, 0, 1, 1, 2, 1, 2, 3, -1], [0, 0, 1, 0, 1, 2, 0, 2, 3]]
    assert rows.dtype == columns.dtype == np.int32


def test_block_lists_refuse_the_future() -> None:
    with pytest.raises(ValueError, match="cannot see blocks that come after it"):
        block_lists(np.ones((1, 2, 2), bool))


@pytest.mark.parametrize(
    ("name", "dtype", "block", "reason"),
    [
        ("int8 window", "float16", 64, "takes no quantised cache"),
        ("sinks", "float16", 64, "takes no window beside its blocks"),
        ("dense", "float32", 64, "is for float16 and bfloat16"),
        ("dense", "float16", 64, "heads 128 wide and blocks of 64 tokens, not 16 and 64"),
    ],
)
def test_refuses_what_the_cuda_kernel_lacks(name: str, dtype: str, block: int, reason: str) -> None:
    (node,) = attention_nodes(traced(name, dtype)[0])
    assert reason in (sparse_refusal(node, block) or "")


def wide_node(**attributes: int | float) -> ir.Node:
    """A traced node of 8 heads 128 wide, in float16."""
    half = ir.TensorType(ir.DataType.FLOAT16)
    query = ir.Value(name="q", type=half, shape=ir.Shape(["b", "t", 1024]))
    cache = ir.Value(name="past_k", type=half, shape=ir.Shape(["b", 2, "capacity", 128]))
    given = [ir.AttrInt64("num_heads", 8)]
    given += [
        ir.AttrFloat32(n, v) if isinstance(v, float) else ir.AttrInt64(n, v) for n, v in attributes.items()
    ]
    return ir.Node("memcompile", "Attention", [query, None, None, cache], given, num_outputs=3)


def test_takes_heads_128_wide_in_blocks_of_64_and_nothing_else() -> None:
    assert sparse_refusal(wide_node(), 64) is None
    assert "not 128 and 32" in (sparse_refusal(wide_node(), 32) or "")
    assert "no soft cap" in (sparse_refusal(wide_node(softcap=2.0), 64) or "")
    assert "no run-time mask" in (sparse_refusal(wide_node(masked=1), 64) or "")


def test_sparse_attention_means_its_blocks(tmp_path: Path) -> None:
    # the CPU provider has this operator in float32, for heads of any width
    model, entries, outputs = finished("dense", "float32", LISTS, sparse)
    write(model, tmp_path / "model.onnx", entries, outputs)
    session = open_session(tmp_path / "model.onnx")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(4, 4, 4, generator=generator) < 0.5
    blocks = (blocks | torch.eye(4, dtype=torch.bool)).tril()
    rows, columns = block_lists(blocks.numpy())
    seen = blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).unsqueeze(0)
    run_calls(session, [200, 1, 1], {"rows": rows, "columns": columns}, seen, generator)


def test_folding_heads_into_the_batch_changes_nothing(tmp_path: Path) -> None:
    # DynamicSparseAttention has no CPU kernel; GroupQueryAttention takes the same folded tensors
    def grouped(node: ir.Node) -> list[ir.Node]:
        return folded(node, "GroupQueryAttention", [], list)

    model, entries, outputs = finished("dense", "float32", {}, grouped)
    write(model, tmp_path / "model.onnx", entries, outputs)
    session = open_session(tmp_path / "model.onnx")
    run_calls(session, [65, 1, 1], {}, None, torch.Generator().manual_seed(1))


def run_calls(
    session: Any,
    calls: list[int],
    more: dict[str, np.ndarray],
    seen: torch.Tensor | None,
    generator: torch.Generator,
) -> None:
    """A prompt and single tokens over one cache, against the definition; `seen` is by position [1,H,T,S]."""
    case = CASES["dense"]
    buffers = [
        onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((1, case.kv_heads, CAPACITY, case.width), np.float32)
        )
        for _ in "kv"
    ]
    state = [torch.zeros(1, case.kv_heads, 0, case.width, dtype=torch.float64) for _ in "kv"]
    used = 0
    for tokens in calls:
        q, k, v = (
            torch.randn(1, heads, tokens, case.width, generator=generator)
            for heads in (case.heads, case.kv_heads, case.kv_heads)
        )
        used += tokens
        positions = torch.arange(used).unsqueeze(0)
        mask = None if seen is None else seen[:, :, used - tokens : used, :used]
        expected, *state = attention_definition(
            q.double(), k.double(), v.double(), *state, positions, mask, scale=case.width**-0.5
        )
        binding = session.io_binding()
        feeds = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "positions": positions.numpy(), **more}
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, buffer in zip("kv", buffers, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        binding.bind_output("out")
        session.run_with_iobinding(binding)
        np.testing.assert_allclose(binding.get_outputs()[2].numpy(), expected.numpy(), atol=1e-5)
