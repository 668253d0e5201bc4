"""Traced attention as ONNX Runtime's sparse operators: by blocks SparseAttention, by slots the dynamic one.

No lowering chooses them yet: `cuda_attention.py` refuses regions that choose keys. What the CUDA kernels of
onnxruntime-gpu 1.31.1 take, from the operators' schemas and the messages in its library:

- SparseAttention: float16 and bfloat16, heads 128 wide, blocks of 64 tokens, compute capability 7.5 to 9.0,
  past and present in one buffer. Which blocks is data, one layout a head, the same for every row of a batch.
- DynamicSparseAttention: float32 too. Which slots is data, one list a query, shared by all heads: where every
  key/value head has its own list, heads are folded into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from memcompile.backends.onnxruntime.cuda_attention import HALF_TYPES
from memcompile.backends.onnxruntime.finish import (
    LAST_SLOT,
    PAST_K,
    PAST_V,
    SLOTS,
    K,
    Q,
    V,
    all_inputs,
)
from memcompile.backends.onnxruntime.nodes import MICROSOFT

SPARSE_WIDTH: Final = 128
SPARSE_BLOCK_TOKENS: Final = 64
INT32, INT64 = np.int32, np.int64
Arrange = Callable[[list[ir.Value]], list[ir.Value | None]]


def sparse_refusal(node: ir.Node, block_tokens: int) -> str | None:
    """Why SparseAttention's CUDA kernel cannot compute a traced node in blocks of `block_tokens`, or None."""
    names, query = node.attributes, all_inputs(node)[Q]
    assert query is not None
    lacks = {"bits": "quantised cache", "window": "window beside its blocks", "masked": "run-time mask"}
    for name, what in lacks.items():
        if names.get_int(name, 0):
            return f"SparseAttention takes no {what}"
    if names.get_float("softcap", 0.0):
        return "SparseAttention takes no soft cap"
    if query.dtype not in HALF_TYPES:
        return "SparseAttention's CUDA kernel is for float16 and bfloat16"
    width = _width(node)
    if (width, block_tokens) != (SPARSE_WIDTH, SPARSE_BLOCK_TOKENS):
        return (
            f"SparseAttention's CUDA kernel is for heads {SPARSE_WIDTH} wide and blocks of "
            f"{SPARSE_BLOCK_TOKENS} tokens, not {width} and {block_tokens}"
        )
    return None


def sparse_attention(
    node: ir.Node, block_rows: ir.Value, block_columns: ir.Value, *, block_tokens: int
) -> list[ir.Node]:
    """SparseAttention for a traced node, and the nodes it needs; the last one has the traced node's outputs.

    block_rows: int32 [layouts, blocks + 1], block_columns: int32 [layouts, most], from `block_lists`; heads
    take the layouts in turn. Rows are blocks of positions, from the first token on, not of the queries of a
    call.
    """
    inputs = all_inputs(node)
    last_slot = inputs[LAST_SLOT]
    one = _constant([1], INT32)
    totals = ir.Node("", "Add", [last_slot, one.outputs[0]])
    names = node.attributes
    made = ir.Node(
        MICROSOFT,
        "SparseAttention",
        [*inputs[: PAST_V + 1], block_rows, block_columns, inputs[SLOTS], totals.outputs[0]],
        [
            ir.AttrInt64("num_heads", names.get_int("num_heads", 0)),
            ir.AttrInt64("kv_num_heads", names.get_int("kv_num_heads", 0)),
            ir.AttrFloat32("scale", names.get_float("scale", 0.0)),
            ir.AttrInt64("do_rotary", 0),
            ir.AttrInt64("sparse_block_size", block_tokens),
        ],
        outputs=_outputs(node),
        name=node.name,
    )
    return [one, totals, made]


def block_lists(blocks: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The lists SparseAttention reads, from the blocks that each block of queries sees, bool [layouts,N,N].

    Gives where each row of blocks begins, int32 [layouts, N + 1], and the columns, int32 [layouts, most], -1
    behind the end. Raises ValueError for a block in the future, which the operator cannot see.
    """
    if np.triu(blocks, 1).any():
        raise ValueError("a block of queries cannot see blocks that come after it")
    layouts, rows, _ = blocks.shape
    begins = np.zeros((layouts, rows + 1), INT32)
    begins[:, 1:] = blocks.sum(axis=2).cumsum(axis=1)
    columns = np.full((layouts, max(1, int(begins[:, -1].max()))), -1, INT32)
    for layout, layout_blocks in enumerate(blocks):
        found = np.nonzero(layout_blocks)[1]
        columns[layout, : len(found)] = found
    return begins, columns


def dynamic_sparse_attention(node: ir.Node, selected: ir.Value, counts: ir.Value) -> list[ir.Node]:
    """DynamicSparseAttention for a traced node, and the nodes around it; the last have the node's outputs.

    selected: int32 [B*G*T, most], the slots each query of each key/value head looks at, -1 behind the last;
    counts: int32 [B*G*T], how many they are.
    """
    attributes = [
        ir.AttrString("attention_mode", "selected_only"),
        ir.AttrString("selected_kv_source", "main"),
        ir.AttrInt64("is_causal", 1),
    ]

    def arrange(folded: list[ir.Value]) -> list[ir.Value | None]:
        *sequences, last_slot, total = folded
        return [*sequences, None, None, selected, counts, last_slot, total]

    return folded(node, "DynamicSparseAttention", attributes, arrange)


def folded(node: ir.Node, operator: str, attributes: Sequence[ir.Attr], arrange: Arrange) -> list[ir.Node]:
    """A traced node as `operator` with one key/value head, heads folded into the batch: row b*G + g.

    `arrange` gets queries, keys, values [B*G,T,·], caches [B*G,1,C,D], last slots [B*G] and the number of
    slots, and gives the operator's inputs.
    """
    names, inputs = node.attributes, all_inputs(node)
    heads, groups = names.get_int("num_heads", 0), names.get_int("kv_num_heads", 0)
    assert heads
    assert groups
    nodes: list[ir.Node] = []

    def add(operator: str, of: Sequence[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        nodes.append(ir.Node("", operator, of, attributes))
        return nodes[-1].outputs[0]

    def shape(*dims: int) -> ir.Value:
        nodes.append(_constant(dims, INT64))
        return nodes[-1].outputs[0]

    def fold(packed: ir.Value | None) -> ir.Value:
        split = add("Reshape", [packed, shape(0, 0, groups, -1)])
        apart = add("Transpose", [split], ir.AttrInt64s("perm", [0, 2, 1, 3]))
        return add("Squeeze", [add("Reshape", [apart, shape(-1, 1, 0, 0)]), shape(1)])

    values = [fold(inputs[index]) for index in (Q, K, V)]
    values += [add("Reshape", [inputs[index], shape(-1, 1, 0, 0)]) for index in (PAST_K, PAST_V)]
    column = add("Unsqueeze", [inputs[LAST_SLOT], shape(1)])
    values.append(add("Reshape", [add("Expand", [column, shape(1, groups)]), shape(-1)]))
    total = inputs[SLOTS]
    assert total is not None
    values.append(total)
    made = ir.Node(
        MICROSOFT,
        operator,
        arrange(values),
        [
            ir.AttrInt64("num_heads", heads // groups),
            ir.AttrInt64("kv_num_heads", 1),
            ir.AttrFloat32("scale", names.get_float("scale", 0.0)),
            ir.AttrInt64("do_rotary", 0),
            *attributes,
        ],
        num_outputs=3,
        name=node.name,
    )
    nodes.append(made)
    out, *present = made.outputs
    wide = add("Reshape", [add("Unsqueeze", [out, shape(1)]), shape(-1, groups, 0, 0)])
    together = add("Transpose", [wide], ir.AttrInt64s("perm", [0, 2, 1, 3]))
    packed_shape, cache_shape = shape(0, 0, -1), shape(-1, groups, 0, 0)
    new_out, *new_present = _outputs(node)
    nodes.append(ir.Node("", "Reshape", [together, packed_shape], outputs=[new_out]))
    nodes += [
        ir.Node("", "Reshape", [old, cache_shape], outputs=[new])
        for old, new in zip(present, new_present, strict=True)
    ]
    return nodes


def _width(node: ir.Node) -> int | None:
    """The head width of a traced node with a float cache."""
    cache = all_inputs(node)[PAST_K]
    width = None if cache is None or cache.shape is None else cache.shape[-1]
    return width if isinstance(width, int) else None


def _constant(values: Sequence[int], kind: type[np.int32 | np.int64]) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(values, kind)))])


def _outputs(node: ir.Node) -> list[ir.Value]:
    return [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in node.outputs]
