"""Follow axes through reshapes, transposes and repeats, so that one layout serves every way of writing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from memcompile.frontend.recognise.evaluate import Sizes, shape_of

aten = torch.ops.aten

_PERMUTES = {
    aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.swapaxes.default,
    aten.movedim.int, aten.movedim.intlist, aten.swapdims.default, aten.numpy_T.default, aten.adjoint.default,
}  # fmt: skip
_REGROUPS = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims,
    aten.view_as.default, aten.reshape_as.default,
}  # fmt: skip
_REPEATS = {
    aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.tile.default,
}  # fmt: skip
SHAPE_OPERATIONS = _PERMUTES | _REGROUPS | _REPEATS
CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default,
}  # fmt: skip


class Untraceable(Exception):
    """An axis cannot be followed; the message says where."""


@dataclass(eq=False, slots=True)
class Atom:
    """A factor of an axis that nothing splits further. `repeated`: a repeat added it, with equal values."""

    size: int
    repeated: bool = False


Axis = list[Atom]


@dataclass(slots=True)
class Layout:
    """The axes of a tensor as atoms, beside the axes of the tensor it was made from by moving data only.

    `source`, `operand` and `kept` (a state of `operand` to come back to) share their atoms: splitting one
    splits the others. Axes of size 1 have no atoms.
    """

    source: list[Axis]
    operand: list[Axis]
    kept: list[Axis] = field(default_factory=list)

    def keep(self) -> None:
        """Remember where the axes stand now."""
        self.kept = [list(axis) for axis in self.operand]

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Layout:
        axes = [[Atom(n)] if n != 1 else [] for n in shape]
        return cls(axes, [list(axis) for axis in axes])

    def split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        """Split an atom into `outer` times the rest, everywhere it stands."""
        parts = (Atom(outer, atom.repeated), Atom(atom.size // outer, atom.repeated))
        for axes in (self.source, self.operand, self.kept):
            for index, axis in enumerate(axes):
                axes[index] = [p for a in axis for p in (parts if a is atom else (a,))]
        return parts

    def group(self, atoms: Axis, shape: Sequence[int]) -> list[Axis]:
        """Deal a row-major run of atoms out to axes of the given sizes, splitting atoms where needed."""
        pending = list(atoms)
        axes: list[Axis] = []
        for size in shape:
            axis: Axis = []
            while size > 1:
                if not pending:
                    raise Untraceable("a reshape has more elements than its operand")
                atom = pending.pop(0)
                if size % atom.size == 0:
                    axis.append(atom)
                    size //= atom.size
                elif atom.size % size == 0:
                    outer, inner = self.split(atom, size)
                    axes = [[p for a in x for p in ((outer, inner) if a is atom else (a,))] for x in axes]
                    axis.append(outer)
                    pending.insert(0, inner)
                    size = 1
                else:
                    raise Untraceable("a reshape cuts across an axis")
            axes.append(axis)
        if pending:
            raise Untraceable("a reshape drops elements")
        return axes

    def apply(self, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Move the operand's axes through one node."""
        if node.target in _REGROUPS:
            self.operand = self.group([atom for axis in self.operand for atom in axis], after)
        elif node.target in _PERMUTES:
            self.operand = [self.operand[i] for i in _permutation(node, len(before))]
        elif node.target in _REPEATS:
            self._repeat(node, before, after)
        elif before != after:
            raise Untraceable(f"{node.name} broadcasts")

    def _repeat(self, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        new_axes = len(after) - len(before)
        operand: list[Axis] = [[] for _ in range(new_axes)] + self.operand
        widths = (1,) * new_axes + before
        for index, (old, new) in enumerate(zip(widths, after, strict=True)):
            if old == new:
                continue
            if new % old:
                raise Untraceable(f"{node.name} repeats unevenly")
            copies = Atom(new // old, repeated=True)
            # repeat_interleave repeats each element, repeat the whole axis
            inner = node.target is aten.repeat_interleave.self_int
            operand[index] = [*operand[index], copies] if inner else [copies, *operand[index]]
        self.operand = operand


def align(one: Layout, one_axis: Callable[[], Axis], other: Layout, other_axis: Callable[[], Axis]) -> None:
    """Split the atoms of two equally long axes until they pair up one to one."""
    index = 0
    while index < max(len(one_axis()), len(other_axis())):
        if index >= min(len(one_axis()), len(other_axis())):
            raise Untraceable("two operands have axes of different size")
        a, b = one_axis()[index], other_axis()[index]
        if a.size == b.size:
            index += 1
        elif a.size % b.size == 0:
            one.split(a, b.size)
        elif b.size % a.size == 0:
            other.split(b, a.size)
        else:
            raise Untraceable("two operands divide an axis differently")


def _permutation(node: fx.Node, rank: int) -> list[int]:
    """The order a permuting node puts the axes in, asked of the operation itself."""
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [size - 2 for size in moved.shape]


@dataclass(frozen=True, slots=True)
class Trace:
    """Where an operand comes from: `factor` times the values of `source`, moved as `layout` says."""

    operand: fx.Node
    source: fx.Node
    layout: Layout
    factor: float = 1.0
    between: tuple[fx.Node, ...] = field(default=())

    def scaled(self, factor: float) -> Trace:
        return replace(self, factor=self.factor * factor)


def trace(operand: fx.Node, sizes: Sizes, *, through_scale: bool, shallow: bool = False) -> Trace:
    """Walk back from `operand` through everything that only moves, repeats, casts (or scales) values.

    shallow: take the operand as it is.
    """
    if shallow:
        return Trace(operand, operand, Layout.of_shape(shape_of(operand, sizes)))
    chain: list[fx.Node] = []
    factor = 1.0
    node = operand
    while True:
        previous = node.args[0] if node.args else None
        if not isinstance(previous, fx.Node) or node.op != "call_function":
            break
        if node.target in SHAPE_OPERATIONS or node.target in CASTS:
            chain.append(node)
        elif through_scale and (constant := scalar_factor(node)) is not None:
            previous, value = constant
            factor *= value
            chain.append(node)
        else:
            break
        node = previous
    while True:
        # the deepest source whose way to the operand can be followed
        try:
            layout = _follow(node, chain, sizes)
            break
        except Untraceable:
            if not chain:
                raise
            node = chain.pop()
            factor = 1.0 if not through_scale else _factor_of(chain)
    return Trace(operand, node, layout, factor, tuple(reversed(chain)))


def _factor_of(chain: Sequence[fx.Node]) -> float:
    factors = (scalar_factor(n) for n in chain if n.target not in SHAPE_OPERATIONS and n.target not in CASTS)
    return math.prod(f[1] for f in factors if f is not None)


def _follow(source: fx.Node, chain: Sequence[fx.Node], sizes: Sizes) -> Layout:
    shape = shape_of(source, sizes)
    layout = Layout.of_shape(shape)
    for node in reversed(chain):
        after = shape_of(node, sizes)
        layout.apply(node, shape, after)
        shape = after
    return layout


def scalar_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """`x * c`, `c * x` or `x / c` with a Python number: x and the factor."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and _is_number(right):
        return left, float(right) if node.target is aten.mul.Tensor else 1.0 / float(right)  # type: ignore[arg-type]
    if isinstance(right, fx.Node) and _is_number(left) and node.target is aten.mul.Tensor:
        return right, float(left)  # type: ignore[arg-type]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
