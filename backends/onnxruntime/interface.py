"""Names, types and dims of a lowered program: see docs/backends/onnxruntime.md."""

from __future__ import annotations

import torch

from memcompile.backends.onnxruntime.attention import padded_width
from memcompile.lowering import interface
from memcompile.lowering.interface import BATCH, ROWS, TOKENS, StepInterface, cache_tensors
from memcompile.program import PositionGroup, Program

__all__ = ["BATCH", "ROWS", "TOKENS", "StepInterface", "cache_tensors", "step_interface"]


def step_interface(program: Program, device: str) -> StepInterface:
    """The interface of the program's step function on a device. Raises MC203."""

    def float_type(dtype: torch.dtype) -> str:
        # the CPU provider's fused operators are float32
        return "float16" if dtype == torch.float16 and device == "cuda" else "float32"

    def cache_type(dtype: torch.dtype, group: PositionGroup) -> str:
        # kernels read it as it is; `compress` is fed by the host, whose arrays have no such type
        narrow = dtype == torch.bfloat16 and device == "cpu" and group.evict is None
        return "bfloat16" if narrow else float_type(dtype)

    conventions = interface.Conventions(padded_width, float_type, cache_type, masked=True)
    return interface.step_interface(program, conventions)
