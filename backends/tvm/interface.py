"""Names, types and dims of a program lowered by TVM: see docs/backends/tvm.md."""

from __future__ import annotations

import torch

from memcompile.errors import MemcompileError
from memcompile.lowering import interface
from memcompile.lowering.interface import StepInterface
from memcompile.program import PositionGroup, Program


def step_interface(program: Program) -> StepInterface:
    """The interface of the program's step function; everything is float32.

    Raises MC203 for what the attention kernel has no layout for.
    """
    for state in program.states:
        if state.bits == 4 and state.head_dim % 2:
            raise MemcompileError(
                "MC203",
                f"region {state.region} has heads of {state.head_dim} channels, and 4-bit caches pack pairs",
                fix="use kv.quantize with bits: 8",
            )
    return interface.step_interface(program, interface.Conventions(_same, _float32, _float32, masked=False))


def _same(width: int) -> int:
    return width


def _float32(dtype: torch.dtype, group: PositionGroup | None = None) -> str:
    return "float32"
