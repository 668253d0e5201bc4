"""Kernels in TVMScript: made for given sizes, generic in batch, tokens and slots."""

from __future__ import annotations

from memcompile.backends.tvm.kernels.attention import AttentionSizes, AttentionTiles, attention_kernel
from memcompile.backends.tvm.kernels.cuda_attention import cuda_attention_kernel
from memcompile.backends.tvm.kernels.library_attention import library_attention_kernel, library_takes
from memcompile.backends.tvm.kernels.linear import linear_kernel

__all__ = [
    "AttentionSizes",
    "AttentionTiles",
    "attention_kernel",
    "cuda_attention_kernel",
    "library_attention_kernel",
    "library_takes",
    "linear_kernel",
]
