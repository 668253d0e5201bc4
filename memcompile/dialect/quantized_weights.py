"""Weights as blocks of 3-, 4- or 8-bit codes; those of 4 and 8 in the layout of ONNX Runtime's MatMulNBits.

A row of K weights is cut into blocks along K; the last one is filled up. In a block,
`weight = scale * (code - zero_point) + offset`. Without zero points a code is off by half its range (8 or
128); offsets are there for formats whose zero falls between two codes, such as GGUF's Q4_1. A weight with a
table has neither: `weight = scale * table[code]`, and codes of 3 bits are always numbers of such a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N,K] as codes.

    codes uint8 [N,blocks,block*bits/8], as `pack` lays them out; scales float32 [N,blocks]; zero_points uint8
    [N,ceil(blocks*bits/8)] or None; offsets float32 [N,blocks] or None; table float32 [2**bits] or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    offsets: torch.Tensor | None
    bits: int
    in_features: int
    table: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def operands(self) -> dict[str, torch.Tensor | None]:
        """Its tensors by the names of the operators' arguments, in their order; None for what it lacks."""
        names = ("codes", "scales", "zero_points", "offsets", "table")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of its tensors that the format has, by name."""
        return {name: tensor for name, tensor in self.operands().items() if tensor is not None}

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the codes stand for, [N,K]."""
        return dequantize(
            self.codes, self.scales, self.zero_points, self.offsets, self.bits, self.in_features, dtype,
            self.table,
        )  # fmt: skip


def block_of(codes: torch.Tensor, bits: int) -> int:
    """Weights in a block of `codes` [...,block*bits/8]."""
    return codes.shape[-1] * 8 // bits


def middle_code(bits: int) -> int:
    """The code that stands for zero where a block has no zero point."""
    return 1 << (bits - 1)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [...,n] of `bits` bits as bytes, uint8 [...,ceil(n*bits/8)]; an odd rest is filled with 0.

    Two codes of 4 bits share a byte, the earlier in the low half. 16 codes of 3 bits (n is a multiple) take
    six bytes: four of their low two bits, then two of their high ones, the earlier always in the lower bits.
    """
    values = values.to(torch.uint8)
    if bits == 8:
        return values
    if bits == 3:
        sixteen = values.reshape(*values.shape[:-1], -1, 16)
        parts = [
            (part.reshape(*part.shape[:-1], -1, fields) << torch.arange(0, 8, 8 // fields)).sum(-1)
            for part, fields in ((sixteen & 3, 4), (sixteen >> 2, 8))
        ]
        return torch.cat(parts, -1).flatten(-2).to(torch.uint8)
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[..., ::2] | (values[..., 1::2] << 4)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of `packed` along its last axis, uint8."""
    if bits == 8:
        return packed[..., :count]
    # divisions, and not shifts: every backend that traces this definition has them
    if bits == 3:
        sixteen = packed.reshape(*packed.shape[:-1], -1, 6)
        low = torch.stack([sixteen[..., :4] // by % 4 for by in (1, 4, 16, 64)], -1).flatten(-2)
        high = torch.stack([sixteen[..., 4:] // (1 << bit) % 2 for bit in range(8)], -1).flatten(-2)
        return (low + high * 4).flatten(-2)[..., :count]
    halves = torch.stack((packed & 15, packed // 16), dim=-1)
    return halves.flatten(-2)[..., :count]


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bits: int,
    width: int,
    dtype: torch.dtype,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights [...,width] that codes [...,blocks,bytes] stand for, summed in float32 or wider."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    block = block_of(codes, bits)
    unpacked = unpack(codes, bits, block)
    if table is not None:
        values = table.to(wide)[unpacked.long()]
    elif zero_points is None:
        values = unpacked.to(wide) - middle_code(bits)
    else:
        zeros = unpack(zero_points, bits, codes.shape[-2]).to(wide).unsqueeze(-1)
        values = unpacked.to(wide) - zeros
    values = values * scales.to(wide).unsqueeze(-1)
    if offsets is not None:
        values = values + offsets.to(wide).unsqueeze(-1)
    return values.flatten(-2)[..., :width].to(dtype)


def stored_bytes(
    N: int, K: int, block: int, bits: int, *, zero_points: bool, offsets: bool, table: bool = False
) -> int:
    """Bytes of a quantised weight [N,K]; a table is one for all rows."""
    blocks = -(-K // block)
    codes = N * blocks * block * bits // 8
    floats = N * blocks * 4 * (2 if offsets else 1)
    zeros = N * -(-blocks * bits // 8) if zero_points else 0
    return codes + floats + zeros + (4 << bits if table else 0)


def in_blocks(weight: torch.Tensor, block: int) -> torch.Tensor:
    """A weight [N,K] as float32 blocks [N,blocks,block]; what is missing in the last one is zero."""
    rows, width = weight.shape
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * block - width))
    return padded.reshape(rows, blocks, block)
