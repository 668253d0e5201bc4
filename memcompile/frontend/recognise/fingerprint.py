"""Number the structures of a graph, so that equal regions of thirty layers are proven once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memcompile.frontend.recognise.evaluate import expression, fetch


class Fingerprints:
    """Equal numbers: the nodes compute the same function of the same inputs, buffers and boundary shapes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.numbers: dict[Any, int] = {}
        self.shared: dict[fx.Node, int] = {}

    def of(self, root: fx.Node, boundary: Sequence[fx.Node]) -> int:
        """The number of what `root` computes from the boundary, whose nodes count by order and shape only."""
        local = {
            node: self._number(
                ("boundary", tuple(i for i, b in enumerate(boundary) if b is node), _facts(node))
            )
            for node in boundary
        }
        below = self._dependants(root, set(boundary))
        stack = [root]
        while stack:
            node = stack[-1]
            done = local if node in below else self.shared
            if node in local or node in self.shared:
                stack.pop()
                continue
            waiting = [n for n in node.all_input_nodes if n not in local and n not in self.shared]
            if waiting:
                stack.extend(waiting)
                continue
            done[node] = self._number(self._key(node, local))
            stack.pop()
        return local[root] if root in local else self.shared[root]

    def _dependants(self, root: fx.Node, boundary: set[fx.Node]) -> set[fx.Node]:
        """The nodes between boundary and root; all others mean the same for every region."""
        below: set[fx.Node] = set()
        stack = [root]
        order: list[fx.Node] = []
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or node in boundary:
                continue
            seen.add(node)
            order.append(node)
            if node not in self.shared:
                stack.extend(node.all_input_nodes)
        changed = True
        while changed:
            changed = False
            for node in order:
                if node not in below and any(n in boundary or n in below for n in node.all_input_nodes):
                    below.add(node)
                    changed = True
        return below

    def _key(self, node: fx.Node, local: dict[fx.Node, int]) -> Any:
        if node.op == "placeholder":
            return ("placeholder", node.name)
        if node.op == "get_attr":
            return self._constant(node)
        size = node.meta.get("val")
        if isinstance(size, (torch.SymInt, int)) and not isinstance(size, bool):
            return ("size", str(expression(size)))
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: ("node", local.get(n, self.shared.get(n))))
        return (node.op, str(node.target), repr(args), _facts(node))

    def _constant(self, node: fx.Node) -> Any:
        value = fetch(self.graph_module, str(node.target))
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            raw = value.detach().cpu().contiguous()
            if raw.dtype == torch.bfloat16:
                raw = raw.float()
            digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()
            return ("buffer", str(value.dtype), tuple(value.shape), digest)
        return ("attribute", str(node.target))

    def _number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


def _facts(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(str(expression(s)) for s in value.shape))
    return None
