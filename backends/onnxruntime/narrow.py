"""Weights stored in bfloat16, which the CPU provider casts to float32 for all that it does with them.

Kernels multiply by them as they are stored, and look-ups take their rows before the cast.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from memcompile.backends.onnxruntime.nodes import MEMCOMPILE, MICROSOFT, replace_node

OPERATOR: Final = "LinearBFloat16"


def look_up_before_cast(graph: ir.Graph) -> None:
    """`Gather(Cast(weight), i)` becomes `Cast(Gather(weight, i))`: only the rows that are read are cast."""
    for node in list(graph):
        if node.op_type != "Gather" or node.domain or (weight := _cast_weight(node.inputs[0])) is None:
            continue
        rows = ir.Node("", "Gather", [weight, node.inputs[1]], list(node.attributes.values()), num_outputs=1)
        cast = ir.Node("", "Cast", rows.outputs, [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1)
        replace_node(graph, node, rows, cast)


def kernel_linears(graph: ir.Graph) -> None:
    """Products with a cast weight become the kernel library's, with the weight as it is stored."""
    for node in list(graph):
        if (node.domain, node.op_type) != (MICROSOFT, "FusedMatMul"):
            continue
        x, cast = node.inputs
        weight = _cast_weight(cast)
        plain = {name: attribute.as_int() for name, attribute in node.attributes.items()} == {"transB": 1}
        if weight is not None and plain and weight.shape is not None and len(weight.shape) == 2:
            replace_node(graph, node, ir.Node(MEMCOMPILE, OPERATOR, [x, weight], num_outputs=1))


def _cast_weight(value: ir.Value | None) -> ir.Value | None:
    """The stored bfloat16 tensor that `value` is the cast of."""
    cast = value.producer() if value is not None else None
    if cast is None or cast.op_type != "Cast" or cast.domain:
        return None
    weight = cast.inputs[0]
    stored = weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.BFLOAT16
    return weight if stored else None
