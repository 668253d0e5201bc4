"""Integer codes of a quantised key/value cache: static symmetric scales, 8 or 4 bits.

The same codes as ONNX Runtime's GroupQueryAttention with `k_quant_type`/`v_quant_type` PER_CHANNEL:
int8 holds the code itself; int4 packs two codes a byte, `code + 8`, the even channel in the low nibble.
"""

from __future__ import annotations

import torch

LIMITS = {8: (-128, 127), 4: (-8, 7)}


def code_dtype(bits: int, dtype: torch.dtype) -> torch.dtype:
    """The storage type of a cache with `bits` bits an element; `dtype` itself when it is not quantised."""
    return {0: dtype, 8: torch.int8, 4: torch.uint8}[bits]


def code_width(bits: int, head_dim: int) -> int:
    """Stored elements a head takes for one token."""
    return (head_dim + 1) // 2 if bits == 4 else head_dim


def quantize(x_BGSD: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `x`; `scale` is float32 [G*D], one a channel. Rounds half to even and clips."""
    _, groups, _, width = x_BGSD.shape
    low, high = LIMITS[bits]
    scale_GD = scale.reshape(1, groups, 1, width).to(x_BGSD.device)
    codes = torch.clamp(torch.round(x_BGSD.to(scale.dtype) / scale_GD), low, high)
    if bits == 8:
        return codes.to(torch.int8)
    nibbles = (codes + 8).to(torch.uint8)
    if width % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """The values that codes stand for, [B,G,S,D] in the scale's type."""
    groups = codes.shape[1]
    if bits == 4:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :head_dim]
        codes = nibbles.to(scale.dtype) - 8
    return codes.to(scale.dtype) * scale.reshape(1, groups, 1, head_dim).to(codes.device)
