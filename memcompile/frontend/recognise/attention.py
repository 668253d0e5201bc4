"""Replace every attention region of a graph by one `memcompile::attention`: match, prove, verify, rewrite."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

import memcompile.dialect  # noqa: F401  (registers the operators)
from memcompile.frontend.normalise import normalise
from memcompile.frontend.recognise.axes import Atom, Axis, Untraceable
from memcompile.frontend.recognise.emit import Emitter, coalesce, fake_mode_of, product
from memcompile.frontend.recognise.evaluate import (
    Sizes,
    Unevaluable,
    shape_of,
)
from memcompile.frontend.recognise.fingerprint import Fingerprints
from memcompile.frontend.recognise.layout import Arrangement, Operand, arrange
from memcompile.frontend.recognise.masks import MaskFacts, Probes, data_of, prove
from memcompile.frontend.recognise.match import (
    SDPA,
    SOFTMAX,
    Fused,
    Refused,
    Written,
    read_fused,
    read_written,
)
from memcompile.frontend.recognise.scores import scale_and_softcap, sides, write_mask
from memcompile.frontend.recognise.verify import verify_attention
from memcompile.regions import Refusal, attention_nodes

aten = torch.ops.aten
ATTENTION = torch.ops.memcompile.attention.default


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about one region; it holds for every region of the same structure."""

    scale: float
    softcap: float
    facts: MaskFacts


def recognise(graph_module: fx.GraphModule, probe_inputs: Sequence[Any]) -> list[Refusal]:
    """Find attention in an exported graph and replace it, in place, by `memcompile::attention` nodes.

    graph_module: un-decomposed ATen from `torch.export`, with fake values in `meta["val"]`.
    probe_inputs: example inputs of the model, in the order of its placeholders.
    Returns what looked like attention and was left alone, with the reason.
    """
    normalise(graph_module)
    probes = make_probes(graph_module, probe_inputs)
    rewriter = _Rewriter(probes)
    refusals = []
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in (SDPA, SOFTMAX):
            continue
        try:
            match = read_fused(node) if node.target is SDPA else read_written(node)
            if match is not None:
                rewriter.rewrite(match)
        except Refused as refused:
            refusals.append(Refusal(where=_where(node), reason=str(refused)))
    graph_module.graph.eliminate_dead_code()
    _number_layers(graph_module, rewriter.made)
    graph_module.graph.lint()
    graph_module.recompile()
    return refusals


def make_probes(graph_module: fx.GraphModule, probe_inputs: Sequence[Any]) -> Probes:
    """The example inputs by placeholder name; inputs without an example probe as zeros."""
    placeholders = [
        n for n in graph_module.graph.nodes
        if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
    ]  # fmt: skip
    given = [x for x in pytree.tree_leaves(tuple(probe_inputs)) if isinstance(x, torch.Tensor)]
    inputs = {}
    for index, node in enumerate(placeholders):
        value = node.meta["val"]
        fits = index < len(given) and given[index].ndim == value.ndim and given[index].dtype == value.dtype
        inputs[node.name] = given[index] if fits else torch.zeros([1] * value.ndim, dtype=value.dtype)
    return Probes(graph_module, inputs)


class _Rewriter:
    """Rewrites the matches of one graph, in graph order, and remembers what it proved."""

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self.graph = probes.graph_module.graph
        self.mode = fake_mode_of(self.graph)
        self.sizes: Sizes = probes.primes()
        self.batch_size = self.sizes[probes.batch[0]] if probes.batch else None
        self.fingerprints = Fingerprints(probes.graph_module)
        self.verdicts: dict[int, Verdict | Refused] = {}
        self.positions: dict[tuple[fx.Node, int, bool], fx.Node] = {}
        self.made: list[fx.Node] = []
        self.known_sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        for node in self.graph.nodes:
            if node.target is aten.sym_size.int and node.args[0].op == "placeholder":
                self.known_sizes[node.args[0], node.args[1]] = node
            elif node.op == "call_function":
                break

    def rewrite(self, match: Written | Fused) -> None:
        try:
            found = arrange(match, self.sizes, self.batch_size)
        except Unevaluable as error:
            raise Refused(str(error)) from error
        self._check(found)
        key = self.fingerprints.of(match.out, [s.trace.source for s in (found.q, found.k, found.v)])
        known = self.verdicts.get(key)
        if isinstance(known, Refused):
            raise known
        emit = Emitter(self.graph, match.out, self.sizes, self.mode, self.known_sizes)
        try:
            verdict = self._replace(match, found, emit, known)
        except (Untraceable, Refused, Unevaluable) as error:
            emit.erase()
            refused = Refused(str(error))
            self.verdicts[key] = refused
            raise refused from error
        self.verdicts[key] = verdict

    def _check(self, found: Arrangement) -> None:
        if [a.size for a in found.k.width] != [a.size for a in found.v.width]:
            raise Refused("keys and values have different widths")

    def _replace(
        self, match: Written | Fused, found: Arrangement, emit: Emitter, known: Verdict | None
    ) -> Verdict:
        # the mask comes first: everything else of the region may depend on where its nodes stand
        proven = known is not None and not known.facts.runtime
        mask = None if proven else write_mask(match, found, emit)
        verdict = known or self._investigate(match, found, mask)
        facts = verdict.facts
        q, k, v = (emit.arrange(side.trace, side.roles) for side in (found.q, found.k, found.v))
        q, k, v = _one_dtype(emit, (q, k, v))
        options: dict[str, Any] = {"scale": verdict.scale, "causal": facts.causal, "window": facts.window}
        if verdict.softcap:
            options["softcap"] = verdict.softcap
        if facts.keep is not None:
            options["positions"] = self._positions(facts)
        if facts.runtime:
            options["mask"] = mask
        attention = emit.call(ATTENTION, q, k, v, **options, region="")
        heads = emit.call(operator.getitem, attention, 0)
        new = self._output(match.out, heads, found, emit)
        if known is None:
            random = [s for s in sides(match) if facts.runtime and any(data_of(self.probes, s))]
            verify_attention(self.probes, match.out, new, heads, mask, facts, found, random)
        attention.meta["path"] = module_path(match.out)
        attention.meta["mask_unproven"] = facts.why
        match.out.replace_all_uses_with(new)
        # a fused call counts as random, so dead-code elimination would keep it
        self.graph.erase_node(match.out)
        self.made.append(attention)
        return verdict

    def _investigate(self, match: Written | Fused, found: Arrangement, mask: fx.Node | None) -> Verdict:
        queries, keys = self._tokens(match, found)
        if isinstance(match, Fused):
            width = product(found.q.width)
            scale, softcap = (1.0 / math.sqrt(width) if match.scale is None else match.scale), 0.0
            if match.causal and not self.probes.same(queries, keys):
                raise Refused("is_causal with fewer queries than keys hides the newest keys, not the future")
        else:
            scale, softcap = scale_and_softcap(match, self.probes)
        scale *= found.q.trace.factor * found.k.trace.factor
        if not math.isfinite(scale):
            raise Refused(f"the scale is {scale}")
        if mask is not None:
            return Verdict(scale, softcap, prove(self.probes, mask, queries, keys))
        return Verdict(scale, softcap, MaskFacts(causal=isinstance(match, Fused) and match.causal))

    def _tokens(self, match: Written | Fused, found: Arrangement) -> tuple[Any, Any]:
        """The sizes T and S as the graph's own symbols."""

        def symbol(node: fx.Node, axis: Axis) -> Any:
            wanted = product(axis)
            for size, have in zip(node.meta["val"].shape, shape_of(node, self.sizes), strict=True):
                if have == wanted:
                    return size
            raise Refused("the token axis has no size of its own")

        if isinstance(match, Fused):
            return match.q.meta["val"].shape[-2], match.k.meta["val"].shape[-2]
        scores = match.queries_keys.node
        return symbol(scores, found.queries), symbol(scores, found.keys)

    def _output(self, out: fx.Node, heads: fx.Node, found: Arrangement, emit: Emitter) -> fx.Node:
        """[B,H,T,D] in the axes and the type of the node it replaces."""
        width = Atom(product(found.v.width))
        roles = [found.batch, found.heads, found.queries, [width]]
        axes = [[width] if axis is None else axis for axis in found.out]
        operands = (found.q, found.k, found.v)
        near = (heads, *(s.trace.source for s in operands), *(n for s in operands for n in s.trace.between))
        atoms, order = ([a for axis in frame for a in axis] for frame in (roles, axes))
        if sorted(map(id, order)) != sorted(map(id, atoms)):
            raise Refused("the output does not keep every batch, head and token axis")
        units = coalesce(roles, axes)
        x = emit.reshape(heads, [product(u) for u in units], near)
        x = emit.permute(x, sorted(range(len(units)), key=lambda i: order.index(units[i][0])))
        x = emit.reshape(x, shape_of(out, self.sizes), near)
        wanted = out.meta["val"].dtype
        return x if x.meta["val"].dtype == wanted else emit.call(aten.to.dtype, x, wanted)

    def _positions(self, facts: MaskFacts) -> fx.Node:
        """The positions of the keys: -1 where the padding input marks padding.

        Others are counted without the padding; under a window they keep their slot, as distances count slots.
        """
        assert facts.keep is not None
        key = (facts.keep, facts.kept_value, facts.window > 0)
        if key not in self.positions:
            first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
            emit = Emitter(self.graph, first, self.sizes, self.mode, self.known_sizes)
            kept = facts.keep
            if not (kept.meta["val"].dtype == torch.bool and facts.kept_value):
                kept = emit.call(aten.ne.Scalar if facts.kept_value else aten.eq.Scalar, kept, 0)
            if facts.window:
                order = emit.call(aten.arange.default, emit.call(aten.sym_size.int, facts.keep, 1))
                order = emit.call(aten.expand_as.default, order, kept)
            else:
                counted = emit.call(aten.to.dtype, kept, torch.int64)
                order = emit.call(aten.sub.Tensor, emit.call(aten.cumsum.default, counted, -1), 1)
            self.positions[key] = emit.call(aten.where.ScalarOther, kept, order, -1)
        return self.positions[key]


def _one_dtype(emit: Emitter, operands: Sequence[fx.Node]) -> list[fx.Node]:
    wanted = operands[0].meta["val"].dtype
    for node in operands[1:]:
        wanted = torch.promote_types(wanted, node.meta["val"].dtype)
    return [n if n.meta["val"].dtype == wanted else emit.call(aten.to.dtype, n, wanted) for n in operands]


def module_path(node: fx.Node) -> str:
    """The path of the innermost module a node was traced in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values()))), "")
    return "" if path.startswith("_empty_nn_module_stack") else path


def _where(node: fx.Node) -> str:
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name


def _number_layers(graph_module: fx.GraphModule, made: Sequence[fx.Node]) -> None:
    """Number the new regions: by the number in the module path where that tells them apart, else in order."""
    nodes = attention_nodes(graph_module)
    numbers = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", str(n.meta.get("path", ""))) for n in nodes]
    in_path = [int(found[0]) if len(found) == 1 else -1 for found in numbers]
    by_path = -1 not in in_path and len(set(in_path)) == len(in_path)
    for index, node in enumerate(nodes):
        if node in made:
            layer = in_path[index] if by_path else index
            node.meta["layer"] = layer
            node.kwargs = {**node.kwargs, "region": str(layer)}


__all__ = ["Operand", "make_probes", "module_path", "recognise"]
