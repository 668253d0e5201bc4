"""Write nodes into a graph with their fake values, and take them back when they are not accepted."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memcompile.frontend.recognise.axes import Atom, Axis, Trace, Untraceable
from memcompile.frontend.recognise.evaluate import Sizes, shape_of

aten = torch.ops.aten
# symbols stand in as primes, so a size beyond this holds a symbol
CONSTANT_LIMIT = 10**8
PRIMES = (
    1_000_000_007, 1_000_000_009, 1_000_000_021, 1_000_000_033, 1_000_000_087, 1_000_000_093, 1_000_000_097,
    1_000_000_103, 1_000_000_123, 1_000_000_181, 1_000_000_207, 1_000_000_223, 1_000_000_241, 1_000_000_271,
    1_000_000_289, 1_000_000_297,
)  # fmt: skip


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode the graph was traced with."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


class Emitter:
    """Inserts nodes before `before`; `sizes` gives each size symbol its prime.

    known_sizes: nodes that hold the sizes of inputs and stand in front of everything; grows.
    """

    def __init__(
        self, graph: fx.Graph, before: fx.Node, sizes: Sizes, mode: FakeTensorMode | None,
        known_sizes: dict[tuple[fx.Node, int], fx.Node] | None = None,
    ) -> None:  # fmt: skip
        self.graph = graph
        self.before = before
        self.sizes = sizes
        self.mode = mode
        self.known_sizes = {} if known_sizes is None else known_sizes
        self.made: list[fx.Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One node, placed, with its fake value and the module stack of the node it replaces."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        self.made.append(node)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            if self.mode is None:
                node.meta["val"] = target(*values[0], **values[1])
            else:
                with self.mode, torch.no_grad():
                    node.meta["val"] = target(*values[0], **values[1])
        except (RuntimeError, TypeError, ValueError) as error:
            raise Untraceable(str(error).splitlines()[0]) from error
        return node

    def erase(self) -> None:
        """Take back everything that was made."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()

    def size(self, wanted: int, near: Iterable[fx.Node]) -> int | fx.Node:
        """A size as an argument: the number, or a node that holds it."""
        if wanted < CONSTANT_LIMIT:
            return wanted
        holders = [n for n in self.graph.nodes if n.op == "placeholder"] + list(near)
        for multiple in (False, True):
            for holder in holders:
                if not isinstance(holder.meta.get("val"), torch.Tensor):
                    continue
                for axis, have in enumerate(shape_of(holder, self.sizes)):
                    if have == wanted:
                        return self._size_of(holder, axis)
                    if multiple and have > CONSTANT_LIMIT and wanted % have == 0:
                        rest = self.size(wanted // have, near)
                        return self.call(operator.mul, self._size_of(holder, axis), rest)
        raise Untraceable("a size of the attention cannot be named at run time")

    def _size_of(self, holder: fx.Node, axis: int) -> fx.Node:
        if holder.op != "placeholder":
            return self.call(aten.sym_size.int, holder, axis)
        if (holder, axis) not in self.known_sizes:
            first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with self.graph.inserting_before(first):
                node = self.graph.call_function(aten.sym_size.int, (holder, axis))
            node.meta["val"] = holder.meta["val"].shape[axis]
            self.known_sizes[holder, axis] = node
        return self.known_sizes[holder, axis]

    def reshape(self, x: fx.Node, shape: Sequence[int], near: Iterable[fx.Node] = ()) -> fx.Node:
        """`x` in the given shape; nothing is emitted when it has it."""
        if shape_of(x, self.sizes) == tuple(shape):
            return x
        return self.call(aten.reshape.default, x, [self.size(n, (x, *near)) for n in shape])

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """`x` with its axes in the given order; nothing is emitted when they are."""
        order = list(order)
        if order == list(range(len(order))):
            return x
        swapped = [i for i, o in enumerate(order) if i != o]
        if len(swapped) == 2:
            return self.call(aten.transpose.int, x, swapped[0], swapped[1])
        return self.call(aten.permute.default, x, order)

    def arrange(self, trace: Trace, roles: Sequence[Axis]) -> fx.Node:
        """The trace's source with one axis a role, made of that role's atoms in order."""
        wanted = [atom for role in roles for atom in role]
        source_atoms = [atom for axis in trace.layout.source for atom in axis]
        leftover = [a for a in source_atoms if a not in wanted]
        if leftover or any(a not in source_atoms for a in wanted):
            raise Untraceable("an operand mixes axes that attention keeps apart")
        units = coalesce(trace.layout.source, roles)
        near = (trace.source, *trace.between)
        x = self.reshape(trace.source, [product(u) for u in units], near)
        order = sorted(range(len(units)), key=lambda i: wanted.index(units[i][0]))
        x = self.permute(x, order)
        return self.reshape(x, [product(role) for role in roles], near)


def coalesce(before: Sequence[Axis], after: Sequence[Axis]) -> list[Axis]:
    """The atoms of `before` in order, in runs that stay together in `after`: what a reshape must split."""
    follows = {first: second for axis in after for first, second in itertools.pairwise(axis)}
    units: list[Axis] = []
    for axis in before:
        for index, atom in enumerate(axis):
            if index and follows.get(axis[index - 1]) is atom:
                units[-1].append(atom)
            else:
                units.append([atom])
    return units


def product(atoms: Iterable[Atom]) -> int:
    """The size of an axis made of these atoms."""
    size = 1
    for atom in atoms:
        size *= atom.size
    return size


__all__ = ["PRIMES", "Emitter", "coalesce", "fake_mode_of", "product"]
