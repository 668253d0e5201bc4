"""Run the nodes a region replaces and their replacement on the same values, in float64, and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memcompile.frontend.recognise.evaluate import Unevaluable, shape_of, sized
from memcompile.frontend.recognise.layout import Arrangement
from memcompile.frontend.recognise.masks import (
    HIDDEN,
    MaskFacts,
    Probes,
    named_mask,
    random_marks,
)
from memcompile.frontend.recognise.match import Refused

# in float64, relative to the largest value compared
TOLERANCE = 1.0e-9
_LENGTHS = (1, 4, 7)


def random_values(node: fx.Node, sizes: Any, generator: torch.Generator) -> torch.Tensor:
    """Random values of a node's shape: wide normals, so that softcap and masks show; or bools."""
    shape = shape_of(node, sizes)
    if node.meta["val"].dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.4
    return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def verify_attention(
    probes: Probes, old: fx.Node, new: fx.Node, head_output: fx.Node, mask: fx.Node | None, facts: MaskFacts,
    arrangement: Arrangement, random_sides: Sequence[fx.Node],
) -> None:  # fmt: skip
    """Refuse unless `new` has the values of `old` at several lengths, batch 2.

    head_output: the new attention's [B,H,T,D]; random_sides: masks computed from data, made random.
    Rows whose query is padding, or that see no key, mean nothing and are not compared.
    """
    q, k, v = (side.trace.source for side in (arrangement.q, arrangement.k, arrangement.v))
    extra = (facts.window + 3,) if 0 < facts.window <= 64 else ()
    for length in (1,) if probes.is_static else (*_LENGTHS, *extra):
        sizes = probes.sizes(length, 2)
        generator = torch.Generator().manual_seed(length)
        known: dict[fx.Node, Any] = {
            n: random_values(n, sizes, generator) for n in dict.fromkeys((*random_sides, q, k, v))
        }
        kept: torch.Tensor | None = None
        if facts.keep is not None:
            known[facts.keep], kept = random_marks(facts, sizes, seed=length)
        evaluate = probes.evaluator(sizes, known)
        try:
            wanted, got, heads = evaluate(old), evaluate(new), evaluate(head_output)
            rows = _meaningful_rows(heads, evaluate(mask) if mask is not None else None, facts, kept)
            # the same way from [B,H,T,D] to the output as the values took
            shown = probes.evaluator(sizes, {**known, head_output: rows.to(torch.float64)})(new) > 0.5
        except Unevaluable as error:
            raise Refused(f"the region cannot be run on probe inputs ({error})") from error
        compare(wanted, got, shown, f"{length} tokens")


def _meaningful_rows(
    heads: torch.Tensor, mask: torch.Tensor | None, facts: MaskFacts, kept: torch.Tensor | None
) -> torch.Tensor:
    batch, count, queries, _ = heads.shape
    rows = torch.ones((batch, count, queries), dtype=torch.bool)
    if mask is not None and kept is None:
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN
        rows &= seen.any(-1) if seen.ndim else seen
    if kept is not None:
        keys = kept.shape[1]
        named = named_mask(facts.causal, facts.window, queries, keys)
        rows &= (named & kept.unsqueeze(1)).any(-1).unsqueeze(1)
        if facts.causal or facts.window:
            rows &= kept[:, keys - queries :].unsqueeze(1)
    return rows.unsqueeze(-1).expand(heads.shape)


def compare(wanted: Any, got: Any, shown: torch.Tensor | None, at: str) -> None:
    """Refuse unless both tensors are equal to `TOLERANCE` where `shown`; NaN never passes."""
    if wanted.shape != got.shape:
        raise Refused(f"the replacement is {tuple(got.shape)}, not {tuple(wanted.shape)}, at {at}")
    if shown is not None:
        wanted, got = wanted[shown], got[shown]
    if wanted.numel() == 0:
        return
    difference = float((wanted - got).abs().max())
    limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
    if not difference <= limit:
        raise Refused(f"the replacement differs from the original by {difference:.2g} at {at}")


def verify_nodes(probes: Probes, old: fx.Node, new: fx.Node, sources: Sequence[fx.Node]) -> None:
    """Refuse unless `new` has the values of `old` for random values of `sources`."""
    for length in (1,) if probes.is_static else (2, 5):
        sizes = probes.sizes(length, 2)
        generator = torch.Generator().manual_seed(length)
        make: Callable[[fx.Node], torch.Tensor] = lambda n, s=sizes, g=generator: random_values(n, s, g)  # type: ignore[misc]  # noqa: E731
        known = {n: make(n) for n in dict.fromkeys(sources)}
        evaluate = probes.evaluator(sizes, known)
        try:
            wanted, got = evaluate(old), evaluate(new)
        except Unevaluable as error:
            raise Refused(f"the region cannot be run on probe inputs ({error})") from error
        compare(wanted, got, None, f"{length} tokens")


__all__ = ["TOLERANCE", "sized", "verify_attention", "verify_nodes"]
