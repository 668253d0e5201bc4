"""Clean-up of the exported ONNX graph: join additions with norms, drop what only the exporter needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)

from memcompile.backends.onnxruntime.external import ExpressionTensor
from memcompile.backends.onnxruntime.nodes import MICROSOFT
from memcompile.weights.lazy import Reshape


def clean_up(model: ir.Model) -> None:
    """Rewrite `model` in place."""
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)
    IdentityEliminationPass()(model)
    fuse_skip_norms(model.graph)
    fold_reshaped_weights(model.graph)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)
    forget_shapes(model.graph)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)


def fuse_skip_norms(graph: ir.Graph) -> int:
    """`norm(a + b)` becomes one SkipSimplifiedLayerNormalization that also gives the sum; counts them."""
    fused = 0
    for node in list(graph):
        if node.op_type != "RMSNormalization" or node.domain:
            continue
        total = node.inputs[0]
        add = total.producer() if total is not None else None
        if total is None or add is None or add.op_type != "Add" or add.domain or total.is_graph_output():
            continue
        sides = add.inputs
        if not all(_same_shape(side, total) for side in sides) or total.meta.get("fused"):
            continue
        joined = ir.Node(
            MICROSOFT,
            "SkipSimplifiedLayerNormalization",
            [*sides, node.inputs[1]],
            [ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", 1e-5))],
            outputs=[
                ir.Value(name=node.outputs[0].name, type=total.type, shape=total.shape),
                ir.Value(name=""),
                ir.Value(name=""),
                ir.Value(name=total.name, type=total.type, shape=total.shape),
            ],
            name=node.name,
        )
        joined.outputs[3].meta["fused"] = True
        weight = node.inputs[1]
        # the sum may be read before the norm's weight is computed: only a stored weight is sure to be there
        if weight is None or (weight.producer() is not None and not _is_early(weight)):
            continue
        graph.insert_before(add, joined)
        ir.convenience.replace_all_uses_with(total, joined.outputs[3])
        was_output = node.outputs[0].is_graph_output()
        ir.convenience.replace_all_uses_with(
            node.outputs[0], joined.outputs[0], replace_graph_outputs=was_output
        )
        graph.remove([node, add], safe=True)
        fused += 1
    graph.sort()
    return fused


def fold_reshaped_weights(graph: ir.Graph) -> int:
    """A stored tensor that is read in another shape becomes a tensor of that shape; counts them.

    Nothing is copied: `external.py` gives both the same place. ONNX Runtime would compute a copy at load.
    """
    folded = 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        source, target_shape = node.inputs
        if source is None or target_shape is None or not source.is_initializer() or source.is_graph_input():
            continue
        target = ir.convenience.get_const_tensor(target_shape)
        if source.const_value is None or target is None or node.outputs[0].is_graph_output():
            continue
        shape = [int(size) for size in target.numpy()]
        if any(size == 0 for size in shape):
            continue
        tensor = _reshaped(source.const_value, shape, node.outputs[0].name)
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
        )
        value.const_value = tensor
        graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
        folded += 1
    return folded


def _reshaped(tensor: ir.TensorProtocol, shape: list[int], name: str | None) -> ir.TensorProtocol:
    if not isinstance(tensor, ExpressionTensor):
        return ir.tensor(tensor.numpy().reshape(shape), name=name)
    count = tensor.size
    known = -math.prod(shape)
    sizes = tuple(count // known if size == -1 else size for size in shape)
    return ExpressionTensor(Reshape(tensor.expression, sizes), name)


def _is_early(weight: ir.Value) -> bool:
    """Whether `weight` is computed from stored tensors alone, so that sorting can put it anywhere."""
    producer = weight.producer()
    if producer is None:
        return weight.is_initializer()
    return all(value is None or _is_early(value) for value in producer.inputs)


def _same_shape(side: ir.Value | None, total: ir.Value) -> bool:
    if side is None or side.shape is None or total.shape is None or side.is_initializer():
        return False
    return list(side.shape) == list(total.shape) and len(total.shape) in (2, 3)


def forget_shapes(graph: ir.Graph) -> None:
    """Drop shapes between inputs and outputs: ONNX Runtime infers its own, and some are only claims."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def name_dims(values: Sequence[ir.Value], dims: Sequence[Sequence[int | str]]) -> None:
    """Give interface values their dims."""
    for value, sizes in zip(values, dims, strict=True):
        value.shape = ir.Shape(sizes)
