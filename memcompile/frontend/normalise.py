"""One spelling per operation: what recognition sees is the same however a model was written."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# operations whose result is their first operand, as far as values go
_COPIES = {
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.detach_.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
}  # fmt: skip
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
    aten.type_as.default,
}  # fmt: skip
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default}
# operations that only show another view of their operand's memory
_VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor,
    aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    aten.t.default, aten.flatten.using_ints, aten.unflatten.int, aten.alias.default, aten.detach.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.swapaxes.default,
    aten.mT.default, aten.movedim.int, aten.contiguous.default, operator.getitem,
}  # fmt: skip
_TENSOR_SPELLING = {
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
}


def normalise(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place so that equal operations have equal nodes.

    Dead nodes and metadata assertions go; copies, casts that change nothing and inactive dropout are their
    operand; in-place operations are their functional form where nothing else looks at the same memory; views
    are `reshape`; `exp(x - max) / sum` is `softmax`. Values and output types do not change.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if _is_in_place(node):
            _make_functional(graph, node)
    # a copy protects its source from an in-place operation that could not be made functional
    memory_is_written = any(_is_in_place(node) for node in graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if not memory_is_written and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif not memory_is_written and node.target in _RESHAPES:
            node.target = aten.reshape.default
        elif node.target in _TENSOR_SPELLING:
            node.target = _TENSOR_SPELLING[node.target]
        elif node.target is aten._softmax.default:
            _spell_softmax(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.div.Tensor:
            _fold_written_softmax(graph, node)
    graph.eliminate_dead_code()


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _changes_nothing(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _COPIES:
        return True
    if node.target in _CASTS:
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        return (
            isinstance(before, torch.Tensor)
            and isinstance(after, torch.Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
        )
    if node.target in _DROPOUTS:
        probability = node.args[1]
        training = node.args[2]
        return training is False or bool(probability == 0)
    return False


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(node.target, "_schema", None)
    return (
        node.op == "call_function"
        and name is not None
        and node.target is not aten.detach_.default
        and node.target.namespace == "aten"  # type: ignore[union-attr]
        and name.name.endswith("_")
        and not name.name.endswith("__")
        and bool(node.args)
        and isinstance(node.args[0], fx.Node)
    )


def _make_functional(graph: fx.Graph, node: fx.Node) -> None:
    """Give an in-place operation its functional form, unless another view of the memory is in use."""
    base = node.args[0]
    assert isinstance(base, fx.Node)
    if base.op != "call_function" or base.target in _VIEWS:
        return
    if any(user.target in _VIEWS and user is not node for user in base.users):
        return
    packet = getattr(aten, node.target._schema.name.removeprefix("aten::")[:-1], None)  # type: ignore[union-attr]
    overload = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    if overload is None:
        return
    node.target = overload
    order = {n: i for i, n in enumerate(graph.nodes)}
    base.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])


def _spell_softmax(node: fx.Node) -> None:
    x, dim = node.args[0], node.args[1]
    value = node.meta.get("val")
    node.target = aten.softmax.int
    node.args = (x, dim, value.dtype) if isinstance(value, torch.Tensor) else (x, dim)
    node.kwargs = {}


def _fold_written_softmax(graph: fx.Graph, node: fx.Node) -> None:
    """`exp(x - max(x)) / sum(exp(x - max(x)))` (the maximum is optional) becomes one softmax."""
    top, bottom = node.args[0], node.args[1]
    if not (isinstance(top, fx.Node) and isinstance(bottom, fx.Node)):
        return
    if (
        top.target is not aten.exp.default
        or bottom.target is not aten.sum.dim_IntList
        or bottom.args[0] is not top
    ):
        return
    dims = bottom.args[1]
    if not (
        isinstance(dims, (list, tuple)) and len(dims) == 1 and len(bottom.args) > 2 and bottom.args[2] is True
    ):
        return
    x = top.args[0]
    assert isinstance(x, fx.Node)
    if x.target is aten.sub.Tensor and len(x.args) == 2 and _is_maximum(x.args[1], x.args[0], dims[0]):
        x = x.args[0]
        assert isinstance(x, fx.Node)
    with graph.inserting_before(node):
        softmax = graph.call_function(aten.softmax.int, (x, dims[0]))
    softmax.meta = dict(node.meta)
    node.replace_all_uses_with(softmax)


def _is_maximum(candidate: Any, x: Any, dim: Any) -> bool:
    """Whether `candidate` is the maximum of `x` over `dim`, kept as an axis."""
    if not isinstance(candidate, fx.Node):
        return False
    if candidate.target is operator.getitem and candidate.args[1] == 0:
        return _is_maximum(candidate.args[0], x, dim)
    if candidate.target not in (aten.max.dim, aten.amax.default) or candidate.args[0] is not x:
        return False
    over = candidate.args[1]
    over = over if isinstance(over, (list, tuple)) else [over]
    return list(over) == [dim] and len(candidate.args) > 2 and candidate.args[2] is True
