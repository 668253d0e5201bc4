"""`memcompile methods`: everything that can stand under `passes:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from memcompile.cli import options
from memcompile.cli.output import Output


@click.command()
@options.common
def methods(output: Output) -> None:
    """List every method: its pass, preset, paper, exactness, and the backends it runs on."""
    found = list(_methods())
    if output.json:
        output.emit({"methods": found})
        return
    from memcompile.cli.tables import print_methods

    print_methods(output.console(), found)


def _methods() -> Iterator[dict[str, Any]]:
    """One entry a pass without preset, and one a preset."""
    from memcompile.lowering import BACKENDS
    from memcompile.plan.library import Registry
    from memcompile.rewrite.cards import card

    registry = Registry()
    for name in registry.names():
        one: Any = registry.load(name)
        shared = {
            "exactness": one.exactness.value,
            # a dialect operator that a backend lacks is decomposed: every pass reaches every backend
            "backends": sorted(getattr(one, "backends", BACKENDS)),
        }
        yield {"pass": name, "preset": None, "paper": None, "summary": card(name).summary, **shared}
        for preset, values in one.presets.items():
            yield {"pass": name, "preset": preset, "paper": values.paper, "summary": values.summary, **shared}
