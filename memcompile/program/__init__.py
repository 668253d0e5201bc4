"""The program: named graphs over one set of weights, their state explicit."""

from __future__ import annotations

from memcompile.frontend.captured import Captured
from memcompile.program.compress import make_compress
from memcompile.program.program import PLAIN_GROUP, PositionGroup, Program, StateSpec
from memcompile.program.stateful import make_step, without_choices
from memcompile.regions import copy_graph

__all__ = [
    "PLAIN_GROUP", "PositionGroup", "Program", "StateSpec", "build_program", "copy_graph", "without_choices",
]  # fmt: skip


def build_program(captured: Captured) -> Program:
    """The program of a captured model: `forward`, and for causal models `step` and `compress`."""
    program = Program(
        forward=captured.graph,
        inputs=captured.inputs,
        outputs=captured.outputs,
        model=captured.model,
        logits_index=captured.logits_index,
        rebuild=captured.rebuild,
    )
    return make_compress(make_step(program)) if captured.model.causal else program
