"""The plan: what is done to a model, for which target, and what must hold afterwards.

Text becomes data once, here: `document` reads YAML and remembers lines, `overrides` applies `--set`,
`schema` and the passes' own Configs validate, `plan` is the result.
"""

from __future__ import annotations

from memcompile.plan.entries import PassEntry
from memcompile.plan.plan import Plan, load_plan
from memcompile.plan.schema import Limit

__all__ = ["Limit", "PassEntry", "Plan", "load_plan"]
