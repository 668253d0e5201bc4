"""Products with quantised weights: traced as one operator each, finished as the runtime's own or as a kernel.

The runtime's MatMulNBits has neither an offset a block nor, on the CPU, a fast product of floats with 8-bit
codes: `runtime_products` writes those out, and codes of a table as the floats they stand for, which the
runtime computes once, on loading. One traced node instead of five matters: a model has hundreds, and tracing
is what lowering spends its time on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from memcompile.backends.onnxruntime.nodes import MEMCOMPILE, MICROSOFT, replace_node
from memcompile.kernels import TYPES

OPERATOR: Final = "QuantizedLinear"
# inputs of the traced node, which are also the kernel's
(X, CODES, SCALES, ZERO_POINTS, OFFSETS, TABLE, BIAS) = range(7)
# accuracy_level: what the CPU kernel turns activations into before it multiplies them by codes
INT8: Final = 4
FLOAT: Final = 0
# weights of a block that the kernels take
KERNEL_BLOCKS: Final = (32, 64, 128, 256)


def quantized_products(graph: ir.Graph) -> list[ir.Node]:
    """The traced products of a graph that is not finished."""
    return [node for node in graph if node.domain == MEMCOMPILE and node.op_type == OPERATOR]


def runtime_products(graph: ir.Graph, chooses: Callable[[ir.Node], bool] = lambda _: True) -> None:
    """Write out the traced products that `chooses` names in operators of the runtime's own."""
    shared = _Shared(graph)
    for node in quantized_products(graph):
        if chooses(node):
            _write_out(graph, node, shared)


def kernel_products(graph: ir.Graph) -> None:
    """Finish the traced products: those that a kernel takes become its operator, the others the runtime's."""
    runtime_products(graph, lambda node: not _kernel_takes(node))
    for node in quantized_products(graph):
        level, products = (node.attributes.pop(name).as_int() for name in ("accuracy_level", "products"))
        node.attributes.add(ir.AttrInt64("activations", TYPES["int8"] if level == INT8 else products))


def _kernel_takes(node: ir.Node) -> bool:
    x = node.inputs[X]
    return (
        node.attributes.get_int("block_size") in KERNEL_BLOCKS
        and x is not None
        and x.dtype == ir.DataType.FLOAT
    )


@dataclass
class _Halves:
    """8-bit codes as two sets of 4-bit ones: code = 16 * high + low, so the products add up exactly."""

    codes: tuple[ir.Value, ir.Value]
    scales: tuple[ir.Value, ir.Value]
    zero_points: tuple[ir.Value, ir.Value]


@dataclass
class _Shared:
    """What several products read: written once, where it is first needed."""

    graph: ir.Graph
    indicators: dict[tuple[int, int], ir.Value] = field(default_factory=dict)
    sums: dict[tuple[ir.Value | None, int], ir.Value] = field(default_factory=dict)
    halves: dict[ir.Value | None, _Halves] = field(default_factory=dict)

    def stored(self, name: str, values: Any) -> ir.Value:
        """A stored tensor, the same one for the same name."""
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        array = np.ascontiguousarray(values)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


class _Writer:
    """Adds nodes before one node of a graph, named after it."""

    def __init__(self, node: ir.Node) -> None:
        self._prefix = node.name or node.outputs[0].name or "product"
        self.nodes: list[ir.Node] = []

    def add(
        self, operator: str, inputs: list[ir.Value | None], name: str, *attributes: ir.Attr, domain: str = ""
    ) -> ir.Value:
        while inputs[-1] is None:
            inputs.pop()
        made = ir.Node(domain, operator, inputs, attributes, num_outputs=1, name=f"{self._prefix}_{name}")
        made.outputs[0].name = f"{self._prefix}_{name}_out"
        self.nodes.append(made)
        return made.outputs[0]


def _write_out(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    given: list[ir.Value | None] = [*node.inputs, *[None] * (BIAS + 1 - len(node.inputs))]
    x, codes, scales, zero_points, offsets, table, bias = given
    write = _Writer(node)
    bits, level = node.attributes.get_int("bits"), node.attributes.get_int("accuracy_level")
    kept = [a for name, a in node.attributes.items() if name not in ("bits", "products")]
    out = node.outputs[0]

    def product(
        weights: list[ir.Value | None], width: int, with_bias: ir.Value | None, name: str
    ) -> ir.Value:
        inputs = [x, *weights, None, with_bias]
        made = write.add("MatMulNBits", inputs, name, *kept, ir.AttrInt64("bits", width), domain=MICROSOFT)
        made.type, made.shape = out.type, out.shape
        return made

    if table is not None:
        parts = [write.add("MatMul", [x, _weights(node, shared, write)], "table")]
        parts += [] if bias is None else [bias]
    elif bits == 8 and level == FLOAT:
        # on CPU the runtime unpacks 8-bit codes at every call, 30 to 100 times slower
        halves = _split(node, shared, write)
        parts = [
            product([halves.codes[i], halves.scales[i], halves.zero_points[i]], 4, None if i else bias, word)
            for i, word in enumerate(("high", "low"))
        ]
    else:
        parts = [product([codes, scales, zero_points], bits, bias, "codes")]
    if offsets is not None:
        parts.append(_shift(node, shared, write, x, offsets))
    total = parts[0]
    for index, part in enumerate(parts[1:]):
        total = write.add("Add", [total, part], f"sum{index}")
    replace_node(graph, node, *write.nodes)


def _shift(node: ir.Node, shared: _Shared, write: _Writer, x: ir.Value | None, offsets: ir.Value) -> ir.Value:
    """A small product of each block's sum of x with the offsets.

    The runtime's own float zero points would say the same, but it unpacks such weights at every call.
    """
    width, block = node.attributes.get_int("K"), node.attributes.get_int("block_size")
    if (x, block) not in shared.sums:
        blocks = -(-width // block)
        member = np.arange(width)[:, None] // block == np.arange(blocks)
        indicator = shared.stored(f"block_indicator_{width}_{block}", member.astype(np.float32))
        shared.sums[x, block] = write.add("MatMul", [x, indicator], "sums")
    return write.add(
        "FusedMatMul", [shared.sums[x, block], offsets], "shift", ir.AttrInt64("transB", 1),
        domain=MICROSOFT,
    )  # fmt: skip


def _weights(node: ir.Node, shared: _Shared, write: _Writer) -> ir.Value:
    """The floats [K,N] that codes of a table stand for."""
    codes, scales, table = (node.inputs[index] for index in (CODES, SCALES, TABLE))
    bits, width = node.attributes.get_int("bits"), node.attributes.get_int("K")
    rows, block = node.attributes.get_int("N"), node.attributes.get_int("block_size")

    def numbers(*values: int) -> ir.Value:
        return shared.stored("numbers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def reshaped(value: ir.Value | None, name: str, *shape: int) -> ir.Value:
        return write.add("Reshape", [value, numbers(*shape)], name)

    def fields(value: ir.Value, of_bits: int, name: str) -> ir.Value:
        """The parts of so many bits of each byte of the last axis, on an axis of their own."""
        shifts = shared.stored(f"shifts_{of_bits}", np.arange(0, 8, of_bits, dtype=np.uint8))
        mask = shared.stored(f"mask_{of_bits}", np.uint8((1 << of_bits) - 1))
        right = ir.AttrString("direction", "RIGHT")
        each = write.add("Unsqueeze", [value, numbers(-1)], f"{name}_bytes")
        shifted = write.add("BitShift", [each, shifts], f"{name}_shifted", right)
        return write.add("BitwiseAnd", [shifted, mask], name)

    assert codes is not None
    if bits == 3:
        sixteen = reshaped(codes, "sixteen", rows, -1, 6)

        def halves(name: str, begin: int, end: int, of_bits: int) -> ir.Value:
            part = write.add("Slice", [sixteen, numbers(begin), numbers(end), numbers(-1)], f"{name}_part")
            return reshaped(fields(part, of_bits, name), f"{name}_codes", rows, -1, 16)

        four = shared.stored("uint8_four", np.uint8(4))
        high = write.add("Mul", [halves("high", 4, 6, 1), four], "high_times_four")
        found = write.add("Add", [halves("low", 0, 4, 2), high], "numbers")
    else:
        found = fields(codes, 4, "fields")
    found = reshaped(found, "codes", rows, -1, block)
    index = write.add("Cast", [found], "index", ir.AttrInt64("to", ir.DataType.INT32.value))
    values = write.add("Gather", [table, index], "entries")
    each = write.add("Unsqueeze", [scales, numbers(-1)], "scales")
    weights = reshaped(write.add("Mul", [values, each], "scaled"), "rows", rows, -1)
    if width % block:
        weights = write.add("Slice", [weights, numbers(0), numbers(width), numbers(1)], "cut")
    return write.add("Transpose", [weights], "weights", ir.AttrInt64s("perm", [1, 0]))


def _split(node: ir.Node, shared: _Shared, write: _Writer) -> _Halves:
    """The halves of a product's codes, scales and zero points; the runtime computes them once, on loading."""
    codes, scales = node.inputs[CODES], node.inputs[SCALES]
    zeros = node.inputs[ZERO_POINTS] if len(node.inputs) > ZERO_POINTS else None
    if codes in shared.halves:
        return shared.halves[codes]
    assert codes is not None
    assert codes.shape is not None
    assert scales is not None
    rows, blocks = codes.shape[0], codes.shape[1]
    assert isinstance(rows, int)
    assert isinstance(blocks, int)
    if zeros is None:
        # a code of 128 stands for zero
        packed = np.full((rows, -(-blocks // 2)), 0x88, np.uint8)
        halved = (
            shared.stored(f"zeros_high_{rows}_{blocks}", packed),
            shared.stored(f"zeros_low_{rows}_{blocks}", packed * 0),
        )
    else:
        if blocks % 2:
            filler = shared.stored(f"zeros_filler_{rows}", np.zeros((rows, 1), np.uint8))
            zeros = write.add("Concat", [zeros, filler], "zeros", ir.AttrInt64("axis", 1))
        halved = _halve(zeros, 1, "zeros", shared, write)
    sixteen = shared.stored("sixteen", np.float32(16))
    shared.halves[codes] = _Halves(
        _halve(codes, 2, "codes", shared, write),
        (write.add("Mul", [scales, sixteen], "scales_high"), scales),
        halved,
    )
    return shared.halves[codes]


def _halve(
    value: ir.Value, axis: int, name: str, shared: _Shared, write: _Writer
) -> tuple[ir.Value, ir.Value]:
    """High and low halves of bytes, two a byte along `axis`, the earlier in the low half."""
    zero, one, two, end, last = (
        shared.stored(key, np.array([number], np.int64))
        for key, number in (("zero", 0), ("one", 1), ("two", 2), ("end", 2**62), (f"axis_{axis}", axis))
    )
    even, odd = (
        write.add("Slice", [value, start, end, last, two], f"{name}_{word}")
        for start, word in ((zero, "even"), (one, "odd"))
    )
    four, low_bits, high_bits = (
        shared.stored(key, np.uint8(number))
        for key, number in (("four", 4), ("low_bits", 0x0F), ("high_bits", 0xF0))
    )
    left, right = ir.AttrString("direction", "LEFT"), ir.AttrString("direction", "RIGHT")
    high = write.add("BitwiseOr", [
        write.add("BitShift", [even, four], f"{name}_even_high", right),
        write.add("BitwiseAnd", [odd, high_bits], f"{name}_odd_high"),
    ], f"{name}_high")  # fmt: skip
    low = write.add("BitwiseOr", [
        write.add("BitwiseAnd", [even, low_bits], f"{name}_even_low"),
        write.add("BitShift", [odd, four], f"{name}_odd_low", left),
    ], f"{name}_low")  # fmt: skip
    return high, low
