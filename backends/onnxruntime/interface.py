"""Names, types and dims of a lowered program: see docs/backends/onnxruntime.md."""

from __future__ import annotations

import torch

from memcompile.backends.onnxruntime.attention import padded_width
from memcompile.lowering import interface
from memcompile.lowering.interface import BATCH, ROWS, TOKENS, StepInterface, cache_tensors
from memcompile.program import Program

__all__ = ["BATCH", "ROWS", "TOKENS", "StepInterface", "cache_tensors", "step_interface"]


def step_interface(program: Program, device: str) -> StepInterface:
    """The interface of the program's step function on a device. Raises MC203."""

    def float_type(dtype: torch.dtype) -> str:
        # the CPU provider's fused operators are float32
        return "float16" if dtype == torch.float16 and device == "cuda" else "float32"

    return interface.step_interface(program, interface.Conventions(padded_width, float_type, masked=True))
