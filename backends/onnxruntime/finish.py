"""Make of each traced node an operator that the runtime has: its own, or one of our kernels.

The traced graph holds one `memcompile::Attention` a region with the inputs of both. The portable graph gets
GroupQueryAttention, which every ONNX Runtime has; the kernel graph gets the operators of the kernel library
for the regions they are chosen for. `products.py` finishes products with quantised weights,
`cuda_attention.py` a graph for the CUDA provider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memcompile.backends.onnxruntime.ffn import kernel_layers, whole_layers
from memcompile.backends.onnxruntime.narrow import kernel_linears, look_up_before_cast
from memcompile.backends.onnxruntime.nodes import MEMCOMPILE, MICROSOFT, replace_node
from memcompile.backends.onnxruntime.products import kernel_products, runtime_products

ATTENTION: Final = "memcompile::Attention"
PAGE_BOUNDS: Final = "memcompile::PageBounds"
# inputs of the traced node, in order
(Q, K, V, PAST_K, PAST_V, LAST_SLOT, SLOTS, POSITIONS, K_SCALE, V_SCALE, PATTERN, BIAS, BOUNDS) = range(13)
# what the kernel library's operators for a cache of a type are called after "Attention" and "PageBounds"
SUFFIXES: Final = {
    ir.DataType.FLOAT: "", ir.DataType.BFLOAT16: "BFloat16",
    ir.DataType.INT8: "Int8", ir.DataType.UINT8: "Int4",
}  # fmt: skip
_KERNEL_INTS: Final = (
    "num_heads", "kv_num_heads", "causal", "window", "sinks", "block", "stride", "block_tokens",
    "pattern_from", "splits", "key_tile", "page_tokens", "page_keep", "page_from", "products",
)  # fmt: skip

# set where the place to begin choosing is to be measured: see tuned.py
MEASURED: Final = ("measure_pattern_from", "measure_page_from")

Chooses = Callable[[ir.Node], bool]


def portable(model: ir.Model) -> ir.Model:
    """A copy of the traced model that every ONNX Runtime runs."""
    return finish(model, group_query_attention, look_up_before_cast, runtime_products, whole_layers)


def with_kernels(model: ir.Model, chooses: Chooses) -> ir.Model:
    """A copy on the kernel library: regions that `chooses` names, and products with narrow weights."""
    return finish(
        model,
        lambda node: _kernel(node) if can_run(node) and chooses(node) else group_query_attention(node),
        look_up_before_cast,
        kernel_products,
        kernel_layers,
        kernel_linears,
    )


def can_run(node: ir.Node) -> bool:
    """Whether a kernel computes what this traced node means: it takes no mask made at run time."""
    return not node.attributes.get_int("masked", 0)


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The traced attention nodes of a model that is not finished."""
    return [node for node in model.graph if node.domain == MEMCOMPILE and node.op_type == "Attention"]


def kernels_of(model: ir.Model) -> tuple[str, ...]:
    """The operators of the kernel library that a finished model needs."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return tuple(sorted({node.op_type for node in nodes if node.domain == MEMCOMPILE}))


def finish(
    model: ir.Model, attention: Callable[[ir.Node], ir.Node], *others: Callable[[ir.Graph], None]
) -> ir.Model:
    """A copy in which traced attention is what `attention` gives for it; `others` finish the rest."""
    made = model.clone()
    for other in others:
        other(made.graph)
    for node in attention_nodes(made):
        new = attention(node)
        made.graph.insert_after(node, new)
        for old, value in zip(node.outputs, new.outputs, strict=True):
            old.replace_all_uses_with(value, replace_graph_outputs=True)
        made.graph.remove(node, safe=True)
        if new.domain == MICROSOFT:
            _cast_caches(made.graph, new)
    # whose bounds are read by no kernel are passed on as they are
    for node in [node for node in made.graph if node.domain == MEMCOMPILE and node.op_type == "PageBounds"]:
        _finish_bounds(made, node)
    RemoveUnusedNodesPass()(made)
    if not kernels_of(made):
        made.graph.opset_imports.pop(MEMCOMPILE, None)
    return made


def _finish_bounds(model: ir.Model, node: ir.Node) -> None:
    read = any(user.domain == MEMCOMPILE for user, _ in node.outputs[0].uses())
    if read:
        node.op_type += _suffix(node.inputs[1])
        node.attributes.pop("bits")
        return
    replace_node(model.graph, node, ir.Node("", "Identity", [node.inputs[1]]))


def _suffix(cache: ir.Value | None) -> str:
    assert cache is not None
    assert cache.dtype is not None
    return SUFFIXES[cache.dtype]


def _cast_caches(graph: ir.Graph, node: ir.Node) -> None:
    """The runtime's operator has no bfloat16 on the CPU: it gets float32 copies of such caches."""
    for index, present in zip((PAST_K, PAST_V), node.outputs[1:], strict=True):
        past = node.inputs[index]
        if past is None or past.dtype != ir.DataType.BFLOAT16:
            return
        widen = ir.Node("", "Cast", [past], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1)
        graph.insert_before(node, widen)
        node.replace_input_with(index, widen.outputs[0])
        stored = ir.Value(name=present.name, type=present.type, shape=present.shape)
        present.replace_all_uses_with(stored, replace_graph_outputs=True)
        present.name, present.type = f"{stored.name}_wide", ir.TensorType(ir.DataType.FLOAT)
        to = ir.AttrInt64("to", int(ir.DataType.BFLOAT16))
        graph.insert_after(node, ir.Node("", "Cast", [present], [to], outputs=[stored]))


def all_inputs(node: ir.Node) -> list[ir.Value | None]:
    """The inputs Q to BOUNDS of a traced node; those that are missing at the end are not stored."""
    return [*node.inputs, *[None] * (BOUNDS + 1 - len(node.inputs))]


def _outputs(node: ir.Node) -> list[ir.Value]:
    return [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in node.outputs]


def _kernel(node: ir.Node) -> ir.Node:
    names = node.attributes
    attributes: list[ir.Attr] = [ir.AttrInt64(n, names.get_int(n, 0)) for n in _KERNEL_INTS]
    attributes += [ir.AttrFloat32(n, names.get_float(n, 0.0)) for n in ("scale", "softcap")]
    return ir.Node(
        MEMCOMPILE,
        f"Attention{_suffix(node.inputs[PAST_K])}",
        [*all_inputs(node)[:BIAS], all_inputs(node)[BOUNDS]],
        attributes,
        outputs=_outputs(node),
        name=node.name,
    )


def group_query_attention(node: ir.Node, *, local_window: int = 0) -> ir.Node:
    """GroupQueryAttention for a traced node; `local_window` is its attribute, in place of the bias."""
    names, inputs = node.attributes, all_inputs(node)
    bits = names.get_int("bits", 0)
    attributes: list[ir.Attr] = [
        ir.AttrInt64("num_heads", names.get_int("num_heads")),
        ir.AttrInt64("kv_num_heads", names.get_int("kv_num_heads")),
        ir.AttrFloat32("scale", names.get_float("scale")),
        ir.AttrInt64("do_rotary", 0),
    ]
    if names.get_float("softcap", 0.0):
        attributes.append(ir.AttrFloat32("softcap", names.get_float("softcap")))
    taken, bias = inputs[: SLOTS + 1], inputs[BIAS]
    if local_window:
        attributes.append(ir.AttrInt64("local_window_size", local_window))
        bias = None
    if bias is not None or bits:
        taken += [None, None, None, bias]
    if bits:
        attributes += [
            ir.AttrString("k_quant_type", "PER_CHANNEL"),
            ir.AttrString("v_quant_type", "PER_CHANNEL"),
            ir.AttrInt64("kv_cache_bit_width", bits),
        ]
        taken += [None, inputs[K_SCALE], inputs[V_SCALE]]
    return ir.Node(
        MICROSOFT, "GroupQueryAttention", taken, attributes, outputs=_outputs(node), name=node.name
    )
