"""Give every axis of a matched attention its role: batch, head, query token, key token, width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from memcompile.frontend.recognise.axes import Atom, Axis, Layout, Trace, Untraceable, align, trace
from memcompile.frontend.recognise.emit import CONSTANT_LIMIT
from memcompile.frontend.recognise.evaluate import Sizes, shape_of
from memcompile.frontend.recognise.match import Fused, Product, Refused, Written


@dataclass(frozen=True, slots=True)
class Operand:
    """A query, key or value and the atoms of its [batch, heads, tokens, width]."""

    trace: Trace
    batch: Axis
    heads: Axis
    tokens: Axis
    width: Axis

    @property
    def roles(self) -> list[Axis]:
        return [self.batch, self.heads, self.tokens, self.width]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the operands, the scores and the output of one attention are laid out.

    batch, heads, queries, keys: the atoms of the scores. `scores` are the axes the softmax sees, `out` the
    axes of the output, where None stands for the width of the values.
    """

    q: Operand
    k: Operand
    v: Operand
    batch: Axis
    heads: Axis
    queries: Axis
    keys: Axis
    scores: list[Axis]
    out: list[Axis | None]


def arrange(match: Written | Fused, sizes: Sizes, batch_size: int | None) -> Arrangement:
    """The roles in a matched attention, from as far back as its operands can be followed.

    Refuses what does not have the axes of attention.
    """
    one = _arrange_written if isinstance(match, Written) else _arrange_fused
    try:
        return one(match, sizes, batch_size, False)  # type: ignore[arg-type]
    except (Untraceable, Refused) as deep:
        try:
            return one(match, sizes, batch_size, True)  # type: ignore[arg-type]
        except (Untraceable, Refused):
            raise Refused(str(deep)) from deep


def _arrange_written(match: Written, sizes: Sizes, batch_size: int | None, shallow: bool) -> Arrangement:
    """The roles in attention written out; refuses a softmax over, or values summed over, the wrong axis."""
    first, second = match.queries_keys, match.weights_values
    score = Layout.of_shape(shape_of(first.node, sizes))
    shape = shape_of(first.node, sizes)
    for node in match.scores[1:]:
        after = shape_of(node, sizes)
        score.apply(node, shape, after)
        shape = after
    score.keep()
    dim = match.softmax.args[1]
    assert isinstance(dim, int)
    over = score.kept[dim]
    for node in match.weights[1:]:
        after = shape_of(node, sizes)
        score.apply(node, shape, after)
        shape = after
    found = [i for i, axis in enumerate(score.source) if axis == over and axis]
    if len(found) != 1:
        raise Refused(f"the softmax runs over axis {dim} of the scores, which is not the axis of the keys")
    key_axis = first.out_axes[found[0]]
    keys_are_left = key_axis in first.left_axes
    if keys_are_left == (key_axis in first.right_axes):
        raise Refused(f"the softmax runs over axis {dim} of the scores, which is a batch axis")
    return _arrange(
        first, second, match.weights_are_left, keys_are_left, key_axis, score, dim, sizes, batch_size, shallow
    )


def _arrange_fused(match: Fused, sizes: Sizes, batch_size: int | None, shallow: bool) -> Arrangement:
    """The roles in a fused call."""
    ranks = {len(shape_of(n, sizes)) for n in (match.q, match.k, match.v)}
    rank = max(ranks)
    if min(ranks) < 2:
        raise Refused("an operand has no token axis")
    q_shape, k_shape = shape_of(match.q, sizes), shape_of(match.k, sizes)
    batch = "abcdefgh"[: rank - 2]

    def labels(node: fx.Node, last: str) -> str:
        return batch[rank - len(shape_of(node, sizes)) :] + last

    first = Product(match.node, match.q, match.k, labels(match.q, "xz"), labels(match.k, "yz"), batch + "xy")
    second = Product(match.node, match.q, match.v, batch + "xy", labels(match.v, "yw"), batch + "xw")
    widest = shape_of(match.out, sizes)[:-2]
    score = Layout.of_shape((*widest, q_shape[-2], k_shape[-2]))
    score.keep()
    repeats = widest[-1] // k_shape[-3] if match.grouped and rank > 2 else 1
    return _arrange(first, second, True, False, "y", score, rank - 1, sizes, batch_size, shallow, repeats)


def _arrange(
    first: Product, second: Product, weights_are_left: bool, keys_are_left: bool, key_axis: str,
    score: Layout, dim: int, sizes: Sizes, batch_size: int | None, shallow: bool, repeats: int = 1,
) -> Arrangement:  # fmt: skip
    q_node, k_node = (first.right, first.left) if keys_are_left else (first.left, first.right)
    q_axes, k_axes = (
        (first.right_axes, first.left_axes) if keys_are_left else (first.left_axes, first.right_axes)
    )
    summed = first.summed()
    only_queries = [a for a in first.out_axes if a in q_axes and a not in k_axes]
    if len(summed) != 1 or not only_queries:
        raise Refused("the scores are not a product of queries and keys over one axis")
    # of several axes that only queries have, the last before the keys is the tokens, the others are heads
    query_axis = only_queries[-1]
    batch_axes = [a for a in first.out_axes if a not in (query_axis, key_axis)]
    p_axes, v_axes = (
        (second.left_axes, second.right_axes) if weights_are_left else (second.right_axes, second.left_axes)
    )
    v_node = second.right if weights_are_left else second.left
    keys = score.source[first.out_axes.index(key_axis)]
    second_summed = second.summed()
    if len(second_summed) != 1 or score.operand[p_axes.index(second_summed)] != keys:
        raise Refused(
            f"the softmax runs over axis {dim} of the scores, but the values are summed over another axis"
        )
    widths = [a for a in second.out_axes if a in v_axes and a not in p_axes]
    if len(widths) != 1:
        raise Refused("the values have no single width axis")

    def traced(
        node: fx.Node, axes: str, labels: list[str], frame: Callable[[str], Axis], scale: bool
    ) -> Trace:
        found = trace(node, sizes, through_scale=scale, shallow=shallow)
        if repeats > 1 and node is not q_node:
            found.layout.operand[-3] = [*found.layout.operand[-3], Atom(repeats, repeated=True)]
        _align_all(found, axes, labels, score, frame)
        return found

    def source_axis(label: str) -> Axis:
        return score.source[first.out_axes.index(label)]

    def weight_axis(label: str) -> Axis:
        return score.operand[p_axes.index(label)]

    v_labels = [a for a in p_axes if a != second_summed and a in v_axes]
    q_labels = [a for a in batch_axes if a in q_axes]
    k_labels = [a for a in batch_axes if a in k_axes]
    q = traced(q_node, q_axes, q_labels, source_axis, True)
    k = traced(k_node, k_axes, k_labels, source_axis, True)
    v = traced(v_node, v_axes, v_labels, weight_axis, False)
    for found, axes, labels, frame in (
        (q, q_axes, q_labels, source_axis), (k, k_axes, k_labels, source_axis),
        (v, v_axes, v_labels, weight_axis),
        (q, q_axes, q_labels, source_axis), (k, k_axes, k_labels, source_axis),
    ):  # fmt: skip
        _align_all(found, axes, labels, score, frame)

    def paired(found: Trace, axes: str, labels: list[str], frame: Callable[[str], Axis]) -> dict[Atom, Atom]:
        pairs: dict[Atom, Atom] = {}
        for label in labels:
            pairs.update(zip(frame(label), found.layout.operand[axes.index(label)], strict=False))
        return pairs

    q_pairs = paired(q, q_axes, q_labels, source_axis)
    k_pairs = paired(k, k_axes, k_labels, source_axis)
    v_pairs = paired(v, v_axes, v_labels, weight_axis)
    q_width = q.layout.operand[q_axes.index(summed)]
    batch, heads = _batch_and_heads(
        [source_axis(a) for a in batch_axes], q_pairs, q, q_width, sizes, batch_size
    )
    if any(a not in q_pairs or q_pairs[a].repeated for a in batch + heads):
        raise Refused("the queries are shared between heads or batch entries")
    q_side = Operand(
        q, [q_pairs[a] for a in batch], [q_pairs[a] for a in heads],
        q.layout.operand[q_axes.index(query_axis)], q_width,
    )  # fmt: skip
    k_side = Operand(
        k, _batch_of(k_pairs, batch), _shared_heads(k_pairs, heads),
        k.layout.operand[k_axes.index(key_axis)], k.layout.operand[k_axes.index(summed)],
    )  # fmt: skip
    v_side = Operand(
        v, _batch_of(v_pairs, batch), _shared_heads(v_pairs, heads),
        v.layout.operand[v_axes.index(second_summed)], v.layout.operand[v_axes.index(widths[0])],
    )  # fmt: skip
    if [a.size for a in k_side.heads] != [a.size for a in v_side.heads]:
        raise Refused("keys and values are shared by different numbers of heads")
    out = [None if a in widths else weight_axis(a) for a in second.out_axes]
    return Arrangement(
        q_side, k_side, v_side, batch, heads, source_axis(query_axis), source_axis(key_axis), score.kept, out
    )


def _align_all(
    found: Trace, axes: str, labels: list[str], score: Layout, frame: Callable[[str], Axis]
) -> None:
    for label in labels:
        index = axes.index(label)
        # no atoms: the operand is broadcast over this axis
        if found.layout.operand[index] and frame(label):
            align(
                found.layout, lambda i=index: found.layout.operand[i], score, lambda a=label: frame(a)  # type: ignore[misc]
            )  # fmt: skip


def _batch_and_heads(
    axes: list[Axis], q_pairs: dict[Atom, Atom], q: Trace, width: Axis, sizes: Sizes, batch_size: int | None
) -> tuple[Axis, Axis]:
    """Split the score axes that are not tokens into batch and heads, in order."""
    atoms = [atom for axis in axes for atom in axis]
    if len(axes) > 1:
        chosen = next((axis for axis in axes if [a.size for a in axis] == [batch_size]), axes[0])
        return list(chosen), [a for a in atoms if a not in chosen]
    # heads stand beside the width in what the queries were projected to
    beside = next((axis for axis in q.layout.source if width and width[0] in axis), [])
    heads = [a for a in atoms if q_pairs.get(a) in beside]
    if not heads and len(atoms) > 1:
        symbolic = [a for a in atoms if a.size > CONSTANT_LIMIT] or atoms[:1]
        heads = [a for a in atoms if a not in symbolic]
    return [a for a in atoms if a not in heads], heads


def _batch_of(pairs: dict[Atom, Atom], batch: Axis) -> Axis:
    if any(a not in pairs or pairs[a].repeated for a in batch):
        raise Refused("keys or values are shared across the batch")
    return [pairs[a] for a in batch]


def _shared_heads(pairs: dict[Atom, Atom], heads: Axis) -> Axis:
    """The heads that are really there: neighbours that repeat the same keys share one."""
    own = [a for a in heads if a in pairs and not pairs[a].repeated]
    if heads[: len(own)] != own:
        raise Untraceable("repeated key/value heads are interleaved the other way round")
    return [pairs[a] for a in own]
