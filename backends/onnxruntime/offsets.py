"""Quantised weights with an offset a block: traced as one operator, written out as the runtime's own.

`x @ (scale * code + offset)` is MatMulNBits, and a small product of each block's sum of x with the offsets.
The runtime's own float zero points would say the same, but it unpacks such weights at every call. One traced
node instead of four matters: a model has hundreds of them, and tracing is what lowering spends its time on.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

DOMAIN: Final = "memcompile"
OPERATOR: Final = "OffsetMatMulNBits"
MICROSOFT_DOMAIN: Final = "com.microsoft"


def expand_offsets(graph: ir.Graph) -> int:
    """Write out every traced product with offsets; counts them."""
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == OPERATOR]
    indicators: dict[tuple[int, int], ir.Value] = {}
    sums: dict[tuple[ir.Value | None, int], ir.Value] = {}
    for node in nodes:
        given: list[ir.Value | None] = [*node.inputs, *[None] * (6 - len(node.inputs))]
        x, codes, scales, zero_points, offsets, bias = given
        width, block = node.attributes.get_int("K"), node.attributes.get_int("block_size")
        out = node.outputs[0]
        made: list[ir.Node] = []
        if (x, block) not in sums:
            if (width, block) not in indicators:
                indicators[width, block] = _indicator(graph, width, block)
            made.append(_node("", "MatMul", [x, indicators[width, block]], (), f"{node.name}_sums"))
            sums[x, block] = made[-1].outputs[0]
        inputs = [x, codes, scales, zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        product = _node(
            MICROSOFT_DOMAIN, "MatMulNBits", inputs, node.attributes.values(), f"{node.name}_codes"
        )
        shift = _node(
            MICROSOFT_DOMAIN,
            "FusedMatMul",
            [sums[x, block], offsets],
            (ir.AttrInt64("transB", 1),),
            f"{node.name}_shift",
        )
        total = _node("", "Add", [product.outputs[0], shift.outputs[0]], (), node.name or "")
        for each in (product, shift, total):
            each.outputs[0].type, each.outputs[0].shape = out.type, out.shape
        graph.insert_before(node, [*made, product, shift, total])
        total.outputs[0].name = out.name
        out.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return len(nodes)


def _node(
    domain: str, operator: str, inputs: list[ir.Value | None], attributes: object, name: str
) -> ir.Node:
    made = ir.Node(domain, operator, inputs, list(attributes), num_outputs=1, name=name)  # type: ignore[call-overload]
    made.outputs[0].name = f"{name}_out"
    return made


def _indicator(graph: ir.Graph, width: int, block: int) -> ir.Value:
    """float32 [width,blocks]: 1 where an input belongs to a block."""
    blocks = -(-width // block)
    member = (np.arange(width)[:, None] // block == np.arange(blocks)).astype(np.float32)
    value = ir.Value(
        name=f"block_indicator_{width}_{block}",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(member.shape),
        const_value=ir.tensor(member),
    )
    graph.register_initializer(value)
    return value
