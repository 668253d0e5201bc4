"""Find attention by its structure: product -> scores -> softmax -> product, or one fused call."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from memcompile.frontend.recognise.axes import CASTS, SHAPE_OPERATIONS
from memcompile.frontend.recognise.evaluate import SHAPE_ONLY

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = aten.softmax.int

_ELEMENTWISE = {
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.neg.default,
    aten.tanh.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
}  # fmt: skip
PATH_OPERATIONS = _ELEMENTWISE | CASTS | SHAPE_OPERATIONS
_DROPOUTS = {aten.dropout.default, aten.native_dropout.default}
_LONGEST_PATH = 32


class Refused(Exception):
    """Looks like attention and is not, or not provably; the message is the reason the user reads."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two tensors, its axes named: a name in both operands and not in `out` is summed over."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    out_axes: str
    addend: fx.Node | None = None  # scaled by `beta` and added to `alpha` times the product
    beta: float = 1.0
    alpha: float = 1.0

    def summed(self) -> str:
        return "".join(a for a in self.left_axes if a in self.right_axes and a not in self.out_axes)


@dataclass(frozen=True, slots=True)
class Written:
    """Attention written out. `scores` runs from the product of queries and keys to the softmax's operand,
    `weights` from the softmax to the operand of the product with the values."""

    softmax: fx.Node
    queries_keys: Product
    scores: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    weights_values: Product
    weights_are_left: bool

    @property
    def out(self) -> fx.Node:
        return self.weights_values.node


@dataclass(frozen=True, slots=True)
class Fused:
    """One call of `scaled_dot_product_attention`."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None
    grouped: bool

    @property
    def out(self) -> fx.Node:
        return self.node


def rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else -1


def read_product(node: fx.Node) -> Product | None:
    """The product a node computes, or None."""
    if node.op != "call_function":
        return None
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        left, right = node.args[0], node.args[1]
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        return _matrix_product(node, left, right)
    if node.target is aten.baddbmm.default:
        addend, left, right = node.args[:3]
        if not all(isinstance(n, fx.Node) for n in (addend, left, right)):
            return None
        beta, alpha = _number(node, 3, "beta"), _number(node, 4, "alpha")
        if beta is None or alpha is None:
            return None
        found = _matrix_product(node, left, right)  # type: ignore[arg-type]
        if found is None:
            return None
        kept = addend if beta != 0 else None
        return replace(found, addend=kept, beta=beta, alpha=alpha)  # type: ignore[arg-type]
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _number(node: fx.Node, index: int, name: str) -> float | None:
    value = node.args[index] if len(node.args) > index else node.kwargs.get(name, 1)
    return float(value) if isinstance(value, (int, float)) else None


def _matrix_product(node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    left_rank, right_rank = rank(left), rank(right)
    if left_rank < 2 or right_rank < 2:
        return None
    batch = "abcdefgh"[: max(left_rank, right_rank) - 2]
    return Product(
        node, left, right,
        batch[len(batch) - (left_rank - 2) :] + "xz",
        batch[len(batch) - (right_rank - 2) :] + "zy",
        batch + "xy",
    )  # fmt: skip


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not (isinstance(equation, str) and isinstance(operands, (list, tuple)) and len(operands) == 2):
        return None
    left, right = operands
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    hidden = "0123456789"
    expanded = []
    for term, operand in zip(terms, (left, right), strict=True):
        missing = rank(operand) - (len(term) - 3) if "..." in term else 0
        expanded.append(term.replace("...", hidden[len(hidden) - missing :] if missing else ""))
    widest = max((sum(c in hidden for c in term) for term in expanded), default=0)
    out = out.replace("...", hidden[len(hidden) - widest :] if widest else "")
    if any(len(set(t)) != len(t) for t in (*expanded, out)) or len(expanded[0]) != rank(left):
        return None
    return Product(node, left, right, expanded[0], expanded[1], out)


def find_fused(graph: fx.Graph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op == "call_function" and n.target is SDPA)


def read_fused(node: fx.Node) -> Fused:
    """Read a fused call; refuses active dropout and a scale that is not a number."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    dropout = given.get("dropout_p", 0.0)
    if dropout:
        raise Refused(f"dropout is active (p={dropout}): capture the model in eval()")
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, (int, float)):
        raise Refused("the scale is computed from data")
    q, k, v, mask = (given.get(n) for n in ("query", "key", "value", "attn_mask"))
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    return Fused(
        node, q, k, v, mask if isinstance(mask, fx.Node) else None, bool(given.get("is_causal", False)),
        None if scale is None else float(scale), bool(given.get("enable_gqa", False)),
    )  # fmt: skip


def find_written(graph: fx.Graph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op == "call_function" and n.target is SOFTMAX)


def read_written(softmax: fx.Node) -> Written | None:
    """Read the attention around a softmax.

    None: there is no product of two computed tensors behind it (a router, a vocabulary, a gate).
    Refuses when the surroundings look like attention but its weights are used in another way.
    """
    scores = softmax.args[0]
    assert isinstance(scores, fx.Node)
    paths = [p for p in _paths_to_product(scores, 0) if _is_computed(p[0])]
    if not paths:
        return None
    weights, values, weights_are_left = _follow_weights(softmax)
    # the longest path is the one the masks join: a shorter one comes from a bias that is itself a product
    path = max(paths, key=len)
    queries_keys = read_product(path[0])
    assert queries_keys is not None
    for before, node in zip(path, (*path[1:], softmax), strict=True):
        harmless = (*SHAPE_ONLY, aten.sym_size.int)
        others = [u.name for u in before.users if u is not node and u.target not in harmless]
        if others:
            raise Refused(f"the attention scores are also used by {_list(others)}")
    return Written(softmax, queries_keys, path, weights, values, weights_are_left)


def _paths_to_product(node: fx.Node, depth: int) -> list[tuple[fx.Node, ...]]:
    if read_product(node) is not None:
        return [(node,)]
    if depth > _LONGEST_PATH or node.op != "call_function" or node.target not in PATH_OPERATIONS:
        return []
    found: list[tuple[fx.Node, ...]] = []
    for operand in dict.fromkeys(node.all_input_nodes):
        if isinstance(operand.meta.get("val"), torch.Tensor):
            found += [(*path, node) for path in _paths_to_product(operand, depth + 1)]
    return found[:8]


def _is_computed(node: fx.Node) -> bool:
    """Whether both operands of a product are computed: a product with a weight is a projection."""
    found = read_product(node)
    assert found is not None
    return not any(_is_weight(operand) for operand in (found.left, found.right))


def _is_weight(node: fx.Node) -> bool:
    while node.op == "call_function" and (node.target in SHAPE_OPERATIONS or node.target in CASTS):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        node = operand
    return node.op == "get_attr"


def _follow_weights(softmax: fx.Node) -> tuple[tuple[fx.Node, ...], Product, bool]:
    weights = [softmax]
    while True:
        node = weights[-1]
        users = list(node.users)
        if len(users) != 1:
            raise Refused(_several(node, users))
        user = users[0]
        found = read_product(user)
        if found is not None:
            if found.left is found.right:
                raise Refused("the attention weights are multiplied with themselves")
            return tuple(weights), found, found.left is node
        if user.target in _DROPOUTS:
            raise Refused(f"dropout is active (p={user.args[1]}): capture the model in eval()")
        if user.op == "output":
            raise Refused("the attention weights are an output of the model, not multiplied with values")
        if user.target not in SHAPE_OPERATIONS and user.target not in CASTS:
            raise Refused(f"the attention weights go through {_operation(user)} before they meet the values")
        weights.append(user)


def _several(node: fx.Node, users: Sequence[fx.Node]) -> str:
    if not users:
        return "the attention weights are not used"
    others = [_operation(u) for u in users if read_product(u) is None and u.target not in SHAPE_OPERATIONS]
    others = others or [_operation(u) for u in users]
    return f"the attention weights have a second consumer: {_list(others)}"


def _operation(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    if node.target is operator.getitem:
        return node.name
    return f"{node.name} ({node.target})" if node.op == "call_function" else node.name


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
