"""Names of passes, and the passes behind them: loaded from strings when first asked for."""

from __future__ import annotations

import functools
import importlib
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from memcompile.errors import MemcompileError

if TYPE_CHECKING:
    from memcompile.rewrite.pass_ import Pass

ENTRY_POINT_GROUP: Final = "memcompile.passes"

BUILT_IN: Final[dict[str, str]] = {
    "attention.sparse": "memcompile.passes.attention.sparse:SparseAttention",
    "attention.static": "memcompile.passes.attention.static:StaticAttention",
    "ffn.sparse": "memcompile.passes.ffn.sparse:SparseFfn",
    "kv.evict": "memcompile.passes.kv.evict:EvictTokens",
    "kv.quantize": "memcompile.passes.kv.quantize:QuantizeCache",
    "weights.prune": "memcompile.passes.weights.prune:PruneWeights",
    "weights.quantize": "memcompile.passes.weights.quantize:QuantizeWeights",
}


@functools.cache
def locations() -> dict[str, str]:
    """Every known pass by name, as "module:Class": the built-in ones and those of installed plugins.

    Raises:
        MemcompileError: MC109, a plugin takes a name that is taken.
    """
    found = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if found.get(point.name, point.value) != point.value:
            raise MemcompileError(
                "MC109",
                f"two passes are named {point.name}: {found[point.name]} and {point.value}",
                where=f"entry point group {ENTRY_POINT_GROUP}",
                fix="uninstall one of them, or rename the plugin's pass",
            )
        found[point.name] = point.value
    return found


def pass_names() -> tuple[str, ...]:
    """The names of all passes, sorted."""
    return tuple(sorted(locations()))


@functools.cache
def _load(location: str) -> Any:
    module, _, attribute = location.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def load_pass(name: str, *, where: str | None = None) -> Pass[Any, Any, Any]:
    """The pass called `name`; the same instance each time. Passes hold no state.

    Raises:
        MemcompileError: MC105, there is no such pass.
    """
    known = locations()
    if name not in known:
        raise MemcompileError("MC105", f"{name}: unknown pass", where=where, fix=_suggest(name, known))
    loaded: Pass[Any, Any, Any] = _load(known[name])
    if loaded.name != name:
        raise MemcompileError(
            "MC901", f"{known[name]} is registered as {name} but calls itself {loaded.name}"
        )
    return loaded


def _suggest(name: str, known: dict[str, str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"the passes are {', '.join(sorted(known))}"
