"""Linear layers over torch tensors on the CPU by the kernel library: nothing is copied."""

from __future__ import annotations

import ctypes
from typing import Final, Literal

import torch

from memcompile.dialect.cpu_attention import cpu_library
from memcompile.dialect.quantized_weights import block_of
from memcompile.kernels import TYPES, CLinear

Activations = Literal["float32", "bfloat16", "int8"]

# weights of a block that the kernels take
BLOCKS: Final = (32, 64, 128, 256)


def kernel_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activations: Activations = "float32",
    threads: int | None = None,
) -> torch.Tensor | None:
    """`x @ weight.T + bias`, x [...,K] float32, weight [N,K] float32 or bfloat16; None: no kernel takes them.

    With `activations` "bfloat16" both sides may be rounded to bfloat16 where x has many rows.
    """
    if not weight.is_contiguous() or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    call = CLinear(N=weight.shape[0], K=weight.shape[1], weight=weight.data_ptr())
    call.weight_type = TYPES["float32" if weight.dtype == torch.float32 else "bfloat16"]
    return _run(call, x, {"bias": bias}, activations, threads)


def kernel_quantized_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    *,
    activations: Activations = "float32",
    threads: int | None = None,
) -> torch.Tensor | None:
    """`memcompile::quantized_linear` by the kernel library; None when no kernel takes the tensors."""
    block = block_of(codes, bits)
    if block not in BLOCKS or not codes.is_contiguous() or (table is not None and activations == "int8"):
        return None
    call = CLinear(N=codes.shape[0], K=x.shape[-1], weight=codes.data_ptr(), block=block)
    call.weight_type = TYPES[f"int{bits}"]
    given = {"scales": scales, "zero_points": zero_points, "offsets": offsets, "table": table, "bias": bias}
    return _run(call, x, given, activations, threads)


def _run(
    call: CLinear,
    x: torch.Tensor,
    given: dict[str, torch.Tensor | None],
    activations: Activations,
    threads: int | None,
) -> torch.Tensor | None:
    tensors = [x, *(tensor for tensor in given.values() if tensor is not None)]
    if any(t.device.type != "cpu" for t in tensors) or x.dtype != torch.float32:
        return None
    library = cpu_library()
    if library is None:
        return None
    held = [x.detach().contiguous()]  # what is converted must live as long as the call
    out = torch.empty((*x.shape[:-1], call.N), dtype=x.dtype)
    call.M, call.x, call.out = held[0].numel() // call.K, held[0].data_ptr(), out.data_ptr()
    for name, tensor in given.items():
        if tensor is not None:
            held.append(
                tensor.detach().to(torch.uint8 if name == "zero_points" else torch.float32).contiguous()
            )
            setattr(call, name, ctypes.c_void_p(held[-1].data_ptr()))
    call.activations = TYPES[activations]
    call.threads = torch.get_num_threads() if threads is None else threads
    library.linear(call)
    return out
