"""Replace small patterns by one dialect operator each, verified once per structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from memcompile.frontend.normalise import normalise
from memcompile.frontend.recognise.attention import make_probes, module_path
from memcompile.frontend.recognise.axes import Untraceable
from memcompile.frontend.recognise.emit import Emitter, fake_mode_of
from memcompile.frontend.recognise.evaluate import Unevaluable
from memcompile.frontend.recognise.fingerprint import Fingerprints
from memcompile.frontend.recognise.match import Refused
from memcompile.frontend.recognise.verify import verify_nodes


@dataclass(frozen=True, slots=True)
class Local:
    """A pattern: `out` becomes `target(*args)`; `sources` are where verification puts random values.

    prepare: makes arguments that need nodes of their own; what it returns replaces `args`.
    """

    out: fx.Node
    sources: tuple[fx.Node, ...]
    target: Callable[..., Any]
    args: Sequence[Any] = ()
    prepare: Callable[[Emitter], Sequence[Any]] | None = field(default=None)


def replace_all(graph_module: fx.GraphModule, find: Callable[[fx.Graph, fx.Node], Local | None]) -> int:
    """Replace what `find` reads from each node, where the values stay the same; returns how many."""
    normalise(graph_module)
    graph = graph_module.graph
    probes = make_probes(graph_module, ())
    mode = fake_mode_of(graph)
    sizes = probes.primes()
    fingerprints = Fingerprints(graph_module)
    accepted: dict[int, bool] = {}
    count = 0
    for node in list(graph.nodes):
        found = find(graph, node) if node.op == "call_function" else None
        if found is None:
            continue
        key = fingerprints.of(found.out, found.sources)
        if accepted.get(key) is False:
            continue
        emit = Emitter(graph, found.out, sizes, mode)
        try:
            args = found.args if found.prepare is None else found.prepare(emit)
            new = emit.call(found.target, *args)
            if key not in accepted:
                verify_nodes(probes, found.out, new, found.sources)
        except (Refused, Untraceable, Unevaluable):
            emit.erase()
            accepted[key] = False
            continue
        accepted[key] = True
        new.meta["path"] = module_path(found.out)
        found.out.replace_all_uses_with(new)
        count += 1
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return count
