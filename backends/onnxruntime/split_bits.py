"""Eight-bit weights for float activations: two four-bit products.

On CPU the runtime multiplies floats by 4-bit codes with a kernel, but unpacks 8-bit codes at every call, 30
to 100 times slower. A code is 16 * high + low, so `scale * (code - zero)` is
`16 * scale * (high - zero_high) + scale * (low - zero_low)`: exact, in the same number of bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT_DOMAIN: Final = "com.microsoft"
# inputs that the two operators share, in MatMulNBits' order: codes, scales, zero points
_WEIGHT_INPUTS: Final = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}


@dataclass(frozen=True, slots=True)
class _Half:
    """One half of the codes as stored tensors."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value


def split_eight_bits(graph: ir.Graph) -> int:
    """Split every 8-bit product with float activations, and look-ups of the same codes; counts products."""
    products = [node for node in graph if _is_wide_product(node)]
    # look-ups read the codes in another shape: what they share is the scales
    scales = {node.inputs[2] for node in products}
    look_ups = [
        node
        for node in graph
        if node.op_type == "GatherBlockQuantized" and node.inputs[2] in scales and _bits(node) == 8
    ]
    halves: dict[tuple[ir.Value | None, bool], _Half] = {}
    for node in (*products, *look_ups):
        _split(graph, node, halves)
    return len(products)


def _bits(node: ir.Node) -> int:
    return node.attributes.get_int("bits", 4)


def _is_wide_product(node: ir.Node) -> bool:
    return (
        node.domain == MICROSOFT_DOMAIN
        and node.op_type == "MatMulNBits"
        and _bits(node) == 8
        and node.attributes.get_int("accuracy_level", 0) == 0
        and all(
            value is None or value.const_value is not None
            for value in (node.inputs[1], node.inputs[2], _zero(node))
        )
    )


def _zero(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None


def _split(graph: ir.Graph, node: ir.Node, halves: dict[tuple[ir.Value | None, bool], _Half]) -> None:
    parts = []
    codes_at, scales_at, zeros_at = _WEIGHT_INPUTS[node.op_type]
    for high in (True, False):
        half = _half(graph, node, high, halves)
        inputs = [*node.inputs, *[None] * (zeros_at + 1 - len(node.inputs))]
        inputs[codes_at], inputs[scales_at], inputs[zeros_at] = half.codes, half.scales, half.zero_points
        if not high and node.op_type == "MatMulNBits":
            # the bias counts once
            inputs = inputs[: zeros_at + 1]
        attributes = [a for name, a in node.attributes.items() if name != "bits"]
        parts.append(
            ir.Node(
                MICROSOFT_DOMAIN,
                node.op_type,
                inputs,
                [*attributes, ir.AttrInt64("bits", 4)],
                outputs=[ir.Value(name=f"{node.outputs[0].name}.{_word(high)}", type=node.outputs[0].type)],
                name=f"{node.name}.{_word(high)}",
            )
        )
    old = node.outputs[0]
    total = ir.Node("", "Add", [part.outputs[0] for part in parts], name=f"{node.name}.sum")
    total.outputs[0].name, total.outputs[0].type = f"{old.name}.sum", old.type
    graph.insert_after(node, [*parts, total])
    ir.convenience.replace_all_uses_with(old, total.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _half(
    graph: ir.Graph, node: ir.Node, high: bool, halves: dict[tuple[ir.Value | None, bool], _Half]
) -> _Half:
    codes_at, scales_at, _ = _WEIGHT_INPUTS[node.op_type]
    codes, scales = node.inputs[codes_at], node.inputs[scales_at]
    key = (codes, high)
    if key not in halves:
        assert codes is not None
        assert scales is not None
        shift = 4 if high else 0
        steps: Any = _stored(scales)
        blocks = steps.shape[1]
        zero = _zero(node)
        # without zero points a code of 128 stands for zero
        zeros = np.full((steps.shape[0], blocks), 128, np.uint8) if zero is None else _stored(zero)
        name = f"{codes.name}.{_word(high)}"
        halves[key] = _Half(
            _store(graph, name, _pack((_stored(codes) >> shift) & 15)),
            _store(graph, f"{name}.scales", steps * np.float32(16 if high else 1)),
            _store(graph, f"{name}.zero_points", _pack((zeros >> shift) & 15)),
        )
    return halves[key]


def _word(high: bool) -> str:
    return "high" if high else "low"


def _stored(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _pack(nibbles: NDArray[Any]) -> NDArray[Any]:
    """Two codes a byte along the last axis, the earlier in the low half."""
    if nibbles.shape[-1] % 2:
        nibbles = np.pad(nibbles, [(0, 0)] * (nibbles.ndim - 1) + [(0, 1)])
    packed: NDArray[Any] = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    return packed


def _store(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(values), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape))
    value.const_value = tensor
    graph.register_initializer(value)
    return value
