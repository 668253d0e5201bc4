"""Feed-forward layers that choose neurons: traced as one node each, finished as a kernel or as a whole layer.

The kernel computes one token a row. A prompt runs on the runtime's own products: an `If` on the number of
tokens holds both. Without the kernel library every neuron is computed, and none is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import OPSET, Emitter, emit, lowers
from memcompile.backends.onnxruntime.nodes import MEMCOMPILE, MICROSOFT, replace_node
from memcompile.dialect.ffn import ACTIVATIONS, COUNT_EVERY
from memcompile.regions import argument

SPARSE_FFN: Final = "SparseFfn"
NEURON_COUNTS: Final = "NeuronCounts"
(X, GATE, UP, DOWN, COUNTS) = range(5)


@lowers(torch.ops.memcompile.sparse_ffn.default)
def lower_sparse_ffn(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """One node over the layer's input, its three weights and the counts, if there are any."""
    names = ("x", "gate", "up", "down", "counts")
    inputs = [emitter.value(argument(node, name)) for name in names]
    attributes = {
        "keep": int(argument(node, "keep")),
        "activation": ACTIVATIONS.index(argument(node, "activation")),
        "choosing": int(argument(node, "choosing")),
    }
    return emit(f"{MEMCOMPILE}::{SPARSE_FFN}", inputs, attributes, like=inputs[X], version=1)


@lowers(torch.ops.memcompile.neuron_counts.default)
def lower_neuron_counts(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """One node over a buffer that holds the counts before and after."""
    x, gate, past = (emitter.value(argument(node, name)) for name in ("x", "gate", "past"))
    attributes = {
        "token_keep": int(argument(node, "token_keep")),
        "activation": ACTIVATIONS.index(argument(node, "activation")),
    }
    return emit(f"{MEMCOMPILE}::{NEURON_COUNTS}", [x, gate, past], attributes, like=past, version=1)


def whole_layers(graph: ir.Graph) -> None:
    """Write out the traced nodes in operators of the runtime's own, every neuron computed."""
    for node in _traced(graph):
        if node.op_type == NEURON_COUNTS:
            replace_node(graph, node, ir.Node("", "Identity", [node.inputs[2]]))
        else:
            replace_node(graph, node, *_layer(node))


def kernel_layers(graph: ir.Graph) -> None:
    """Let calls of one token run on the kernel, and all others on the runtime's own operators."""
    single: dict[ir.Value, ir.Value] = {}
    for node in _traced(graph):
        if node.op_type == SPARSE_FFN and not node.attributes.get_int("choosing", 0):
            replace_node(graph, node, *_layer(node))
            continue
        x = node.inputs[X]
        assert x is not None
        if x not in single:
            single[x] = _is_single(graph, node, x)
        if node.op_type == SPARSE_FFN:
            attributes = [ir.AttrInt64(n, node.attributes.get_int(n)) for n in ("keep", "activation")]
            alone: list[ir.Node] = [ir.Node(MEMCOMPILE, SPARSE_FFN, node.inputs, attributes)]
            together = _layer(node)
        else:
            alone = [ir.Node("", "Identity", [node.inputs[2]])]
            together = _counting(node)
        branches = [
            ir.AttrGraph(name, _branch(f"{node.name}_{name}", nodes, node.outputs[0]))
            for name, nodes in (("then_branch", alone), ("else_branch", together))
        ]
        replace_node(graph, node, ir.Node("", "If", [single[x]], branches))


def _traced(graph: ir.Graph) -> list[ir.Node]:
    return [n for n in graph if n.domain == MEMCOMPILE and n.op_type in (SPARSE_FFN, NEURON_COUNTS)]


def _branch(name: str, nodes: Sequence[ir.Node], like: ir.Value) -> ir.Graph:
    # names are unique over all graphs of a model
    for index, node in enumerate(nodes):
        for place, value in enumerate(node.outputs):
            value.name = f"{name}_{index}_{place}"
    result = nodes[-1].outputs[0]
    result.type, result.shape = like.type, like.shape
    return ir.Graph([], [result], nodes=nodes, name=name, opset_imports={"": OPSET})


def _constant(name: str, values: Any) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(values, name=name))])


def _is_single(graph: ir.Graph, before: ir.Node, x: ir.Value) -> ir.Value:
    """Whether x [B,T,M] has one token."""
    shape = ir.Node("", "Shape", [x], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
    one = _constant("one", np.array([1], np.int64))
    equal = ir.Node("", "Equal", [shape.outputs[0], one.outputs[0]])
    scalar = ir.Node("", "Squeeze", [equal.outputs[0]])
    for node in (shape, one, equal, scalar):
        graph.insert_before(before, node)
    return scalar.outputs[0]


def _activate(value: ir.Value, activation: int) -> ir.Node:
    name = ACTIVATIONS[activation]
    if name == "silu":
        return ir.Node(MICROSOFT, "QuickGelu", [value], [ir.AttrFloat32("alpha", 1.0)])
    if name == "relu":
        return ir.Node("", "Relu", [value])
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return ir.Node("", "Gelu", [value], [ir.AttrString("approximate", approximate)])


def _product(x: ir.Value | None, weight: ir.Value | None, *, transposed: bool) -> ir.Node:
    return ir.Node(MICROSOFT, "FusedMatMul", [x, weight], [ir.AttrInt64("transB", 1 if transposed else 0)])


def _layer(node: ir.Node) -> list[ir.Node]:
    x, gate, up, down = node.inputs[:COUNTS]
    gated = _product(x, gate, transposed=True)
    active = _activate(gated.outputs[0], node.attributes.get_int("activation", 0))
    other = _product(x, up, transposed=True)
    hidden = ir.Node("", "Mul", [active.outputs[0], other.outputs[0]])
    return [gated, active, other, hidden, _product(hidden.outputs[0], down, transposed=False)]


def _counting(node: ir.Node) -> list[ir.Node]:
    """Every `COUNT_EVERY`-th token's most active neurons, added to the counts; rows have no padding."""
    x, gate, past = node.inputs
    keep = node.attributes.get_int("token_keep")
    bounds = [
        _constant(name, np.array([value], np.int64))
        for name, value in (("from", 0), ("to", 2**31), ("axis", 1), ("step", COUNT_EVERY), ("keep", keep))
    ]
    start, end, axis, step, kept = (constant.outputs[0] for constant in bounds)
    some = ir.Node("", "Slice", [x, start, end, axis, step])
    gated = _product(some.outputs[0], gate, transposed=True)
    active = _activate(gated.outputs[0], node.attributes.get_int("activation", 0))
    size = ir.Node("", "Abs", [active.outputs[0]])
    largest = ir.Node("", "TopK", [size.outputs[0], kept], num_outputs=2)
    last = _constant("last", np.array([-1], np.int64))
    least = ir.Node("", "ReduceMin", [largest.outputs[0], last.outputs[0]])
    enough = ir.Node("", "GreaterOrEqual", [size.outputs[0], least.outputs[0]])
    zero = _constant("zero", np.array(0, np.float32))
    busy = ir.Node("", "Greater", [size.outputs[0], zero.outputs[0]])
    both = ir.Node("", "And", [enough.outputs[0], busy.outputs[0]])
    number = ir.Node("", "Cast", [both.outputs[0]], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    total = ir.Node("", "ReduceSum", [number.outputs[0], axis], [ir.AttrInt64("keepdims", 0)])
    added = ir.Node("", "Add", [past, total.outputs[0]])
    return [
        *bounds, some, gated, active, size, largest, last, least, enough, zero, busy, both, number, total,
        added,
    ]  # fmt: skip
