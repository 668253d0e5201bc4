"""Triton kernels of `memcompile::attention` for CUDA tensors; on a CPU torch nothing here is used.

tile.py      what one tile of scores goes through
visits.py    which blocks of keys a tile of queries has to visit
prefill.py   many queries
decode.py    few queries over a long cache, split over keys, and the merge of partial results
launch.py    shapes, tile sizes, allocation
operator.py  the operator on top of them
ahead.py     compilation for a GPU that is not here

Importing this package does not import triton.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from memcompile.dialect import attention

__all__ = ["register_cuda"]


def register_cuda() -> bool:
    """Let `memcompile::attention` use these kernels for CUDA tensors; False where triton is not installed.

    They are compiled, and triton is imported, at the first call with CUDA tensors. Without triton the
    operator keeps its general implementation.
    """
    if find_spec("triton") is None:
        return False
    attention.register_kernel("cuda", _first_call)
    return True


def _first_call(*tensors: torch.Tensor | None, **attributes: Any) -> tuple[torch.Tensor, ...]:
    from memcompile.backends.torch.triton.operator import cuda_attention

    return cuda_attention(*tensors, **attributes)  # type: ignore[arg-type]
