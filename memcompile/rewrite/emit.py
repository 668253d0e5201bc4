"""The only way a pass changes a graph. Every change goes into the journal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.rewrite.journal import Journal
from memcompile.weights.parameter import hollow

# how a node came to be at its place in the model: inherited by the nodes that replace it
PLACE_IN_META = ("nn_module_stack", "path", "layer", "stack_trace")


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice a pass made that the plan did not spell out: recorded in the artifact."""

    pass_name: str
    region: str
    text: str

    def as_dict(self) -> dict[str, str]:
        return {"pass": self.pass_name, "region": self.region, "decision": self.text}


@dataclass(slots=True)
class Emit:
    """Changes a graph on behalf of one pass, in one region.

    `statistics` holds what the pass's `calibrate` measured for this region, by name.
    """

    graph_module: fx.GraphModule
    pass_name: str
    region: str
    journal: Journal
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        before: fx.Node,
        like: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call of `target` before the node `before`; it stands at the place of `like` in the model.

        The new node gets the fake value that `target` gives for its arguments' fake values.
        """
        with self.graph_module.graph.inserting_before(before):
            node = self.graph_module.graph.call_function(target, args, kwargs)
        place = before if like is None else like
        node.meta.update({key: place.meta[key] for key in PLACE_IN_META if key in place.meta})
        node.meta["made_by"] = self.pass_name
        node.meta["val"] = _fake_value(node)
        self.journal.add(self.pass_name, "made", node.name, self.region, str(target))
        return node

    def getitem(self, node: fx.Node, index: int, *, before: fx.Node) -> fx.Node:
        """Insert the selection of output `index` of `node`."""
        return self.call(operator.getitem, node, index, before=before, like=node)

    def update(self, node: fx.Node, **kwargs: Any) -> None:
        """Set arguments of `node` by name, wherever they were passed."""
        args, names = list(node.args), _positional_names(node)
        for index in range(len(args)):
            if names[index] in kwargs:
                args[index] = kwargs[names[index]]
        node.args = tuple(args)
        by_name = {name: value for name, value in kwargs.items() if name not in names[: len(args)]}
        node.kwargs = {**node.kwargs, **by_name}
        if "val" in node.meta:
            node.meta["val"] = _fake_value(node)
        detail = ", ".join(f"{name}={value}" for name, value in kwargs.items())
        self.journal.add(self.pass_name, "changed", node.name, self.region, detail)

    def mark(self, node: fx.Node, key: str, value: object) -> None:
        """Store `value` in the metadata of `node`, for a later stage."""
        node.meta[key] = value
        self.journal.add(self.pass_name, "marked", node.name, self.region, f"{key}={value!r}")

    def buffer(self, name: str, tensor: torch.Tensor, *, before: fx.Node) -> fx.Node:
        """Store `tensor` in the graph module, named after `name`; returns the node that reads it."""
        unique = _free_name(self.graph_module, name)
        self.graph_module.register_buffer(unique, tensor)
        self.journal.add(
            self.pass_name, "stored", unique, self.region, f"{tensor.dtype} {list(tensor.shape)}"
        )
        with self.graph_module.graph.inserting_before(before):
            node = self.graph_module.graph.get_attr(unique)
        node.meta["made_by"] = self.pass_name
        node.meta["val"] = _fake_tensor(self.graph_module, tensor)
        self.journal.add(self.pass_name, "made", node.name, self.region, f"reads {unique}")
        return node

    def replace_uses(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new` instead."""
        users = list(old.users)
        old.replace_all_uses_with(new)
        for user in users:
            self.journal.add(
                self.pass_name, "changed", user.name, self.region, f"reads {new.name} for {old.name}"
            )

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody uses any more."""
        self.graph_module.graph.erase_node(node)
        self.journal.add(self.pass_name, "erased", node.name, self.region)

    def decide(self, text: str) -> None:
        """Record a choice that the plan did not spell out."""
        self.decisions.append(Decision(self.pass_name, self.region, text))


def _positional_names(node: fx.Node) -> list[str]:
    """The names of an operator's arguments, in the order of its schema."""
    schema = getattr(node.target, "_schema", None)
    return [declared.name for declared in schema.arguments] if schema is not None else [""] * len(node.args)


def _fake_value(node: fx.Node) -> Any:
    """What the node computes, on the fake values of its arguments."""

    def value(argument: fx.Node) -> Any:
        if "val" not in argument.meta:
            raise MemcompileError("MC901", f"node {argument.name} has no fake value", where=node.name)
        return argument.meta["val"]

    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _fake_tensor(graph_module: fx.GraphModule, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as the graph's fake values are: in the same fake mode, or meta when there is none."""
    for node in graph_module.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            fake: torch.Tensor = mode.from_tensor(hollow(tensor), static_shapes=True)
            return fake
    return tensor


def _free_name(graph_module: fx.GraphModule, wanted: str) -> str:
    base = "".join(c if c.isalnum() else "_" for c in wanted)
    name, count = base, 1
    while hasattr(graph_module, name):
        count += 1
        name = f"{base}_{count}"
    return name
