"""Kernels in TVMScript: made for given sizes, generic in batch, tokens and slots."""

from __future__ import annotations

from memcompile.backends.tvm.kernels.attention import AttentionSizes, attention_kernel
from memcompile.backends.tvm.kernels.cuda_attention import cuda_attention_kernel
from memcompile.backends.tvm.kernels.linear import linear_kernel

__all__ = ["AttentionSizes", "attention_kernel", "cuda_attention_kernel", "linear_kernel"]
