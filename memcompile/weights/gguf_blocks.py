"""GGUF's blocks as the dialect's: every code and scale of the file keeps its value.

Formats: ggml's Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (blocks of 32), Q2_K to Q6_K (super-blocks of 256 whose parts
have scales of their own), TQ2_0 (-1, 0 and 1), and IQ4_NL, IQ4_XS, MXFP4: numbers of a table's values.
Scales are float16 in the file, and their products with the integer scales of parts are float32 here, as ggml
computes them. Codes of 2 and 3 bits take 4; those of 5 and 6 bits, and values of a table, take 8.
Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from memcompile.dialect.quantized_weights import QuantizedWeight, middle_code, pack

# uint8 throughout; numpy's types lose that in every shift
Bytes = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Parts of blocks [n,parts,size]: `weight = scale * (code - zero) + offset`, both [n,parts]."""

    codes: Bytes
    scales: Floats
    offsets: Floats | None
    zero: int
    bits: int


@dataclass(frozen=True, slots=True)
class Format:
    """A block format of the file: bytes and weights of one block, and how it is read."""

    block_bytes: int
    weights: int
    read: Callable[[Bytes], Blocks]


def repack(format_name: str, rows: Bytes, width: int) -> QuantizedWeight:
    """A tensor of the file, uint8 [N,bytes of a row], as a weight [N,width].

    Raises KeyError for a format that is not in `FORMATS`.
    """
    format_ = FORMATS[format_name]
    found = format_.read(np.ascontiguousarray(rows).reshape(-1, format_.block_bytes))
    count = rows.shape[0]
    scales = found.scales.reshape(count, -1)
    middle = middle_code(found.bits)
    codes = found.codes.reshape(count, scales.shape[1], -1)
    offsets = None if found.offsets is None else found.offsets.reshape(count, -1)
    if offsets is None:
        # the file's zero moves to the middle of the codes, which is where it is without zero points
        codes = (codes.astype(np.int16) + (middle - found.zero)).astype(np.uint8)
    else:
        offsets = offsets + scales * np.float32(middle - found.zero)
    return QuantizedWeight(
        pack(torch.from_numpy(codes), found.bits),
        torch.from_numpy(np.ascontiguousarray(scales)),
        None,
        None if offsets is None else torch.from_numpy(np.ascontiguousarray(offsets)),
        found.bits,
        width,
    )


def _half(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _halves(packed: Bytes) -> Bytes:
    """Nibbles of a block of 32: the low halves of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """One bit for each of 32 codes, as 16."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little") << 4


def _q4_0(raw: Bytes) -> Blocks:
    return Blocks(_halves(raw[:, 2:])[:, None], _half(raw[:, :2]), None, 8, 4)


def _q4_1(raw: Bytes) -> Blocks:
    return Blocks(_halves(raw[:, 4:])[:, None], _half(raw[:, :2]), _half(raw[:, 2:4]), 0, 4)


def _q5_0(raw: Bytes) -> Blocks:
    codes = _halves(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return Blocks(codes[:, None], _half(raw[:, :2]), None, 16, 8)


def _q5_1(raw: Bytes) -> Blocks:
    codes = _halves(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return Blocks(codes[:, None], _half(raw[:, :2]), _half(raw[:, 2:4]), 0, 8)


def _q8_0(raw: Bytes) -> Blocks:
    # a signed byte with its sign bit turned is the byte plus 128
    return Blocks((raw[:, 2:] ^ 0x80)[:, None], _half(raw[:, :2]), None, 128, 8)


def _pairs_of_bits(packed: Bytes) -> Bytes:
    """Codes of 2 bits [n,256]: of 32 bytes, the lowest bits are the first 32 codes, the next ones follow."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    return ((packed.reshape(len(packed), -1, 1, 32) >> shifts) & 3).reshape(len(packed), 256)


def _q2_k(raw: Bytes) -> Blocks:
    codes = _pairs_of_bits(raw[:, 16:80]).reshape(-1, 16, 16)
    scales, minima = raw[:, :16] & 15, raw[:, :16] >> 4
    return Blocks(codes, _half(raw[:, 80:82]) * scales, -(_half(raw[:, 82:84]) * minima), 0, 4)


def _q3_k(raw: Bytes) -> Blocks:
    low, high = raw[:, 96:104], raw[:, 104:108]
    lowest = np.concatenate([low & 15, low >> 4], axis=-1)
    highest = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    scales = (lowest | (highest << 4)).astype(np.float32) - np.float32(32)
    thirds = (raw[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    codes = _pairs_of_bits(raw[:, 32:96]) | (thirds.reshape(-1, 256) << 2)
    return Blocks(codes.reshape(-1, 16, 16), _half(raw[:, 108:110]) * scales, None, 4, 4)


def _k_scales(raw: Bytes) -> tuple[Bytes, Bytes]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into twelve bytes."""
    low, middle, high = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=-1)
    return scales, minima


def _k_halves(packed: Bytes) -> Bytes:
    """Nibbles of 256 codes [n,8,32]: of 32 bytes, the low halves are one part, the high ones the next."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(packed), 8, 32)


def _q4_k(raw: Bytes) -> Blocks:
    scales, minima = _k_scales(raw[:, 4:16])
    codes = _k_halves(raw[:, 16:144])
    return Blocks(codes, _half(raw[:, :2]) * scales, -(_half(raw[:, 2:4]) * minima), 0, 4)


def _q5_k(raw: Bytes) -> Blocks:
    scales, minima = _k_scales(raw[:, 4:16])
    places = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = (raw[:, 16:48].reshape(len(raw), 1, 32) >> places) & 1
    codes = _k_halves(raw[:, 48:176]) | (fifth << 4)
    return Blocks(codes, _half(raw[:, :2]) * scales, -(_half(raw[:, 2:4]) * minima), 0, 8)


def _q6_k(raw: Bytes) -> Blocks:
    packed = raw[:, :128].reshape(len(raw), 2, 1, 64)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(raw), 8, 32)
    places = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    high = ((raw[:, 128:192].reshape(len(raw), 2, 1, 32) >> places) & 3).reshape(len(raw), 8, 32)
    codes = (low | (high << 4)).reshape(len(raw), 16, 16)
    scales = _half(raw[:, 208:210]) * np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return Blocks(codes, scales, None, 32, 8)


def _tq2_0(raw: Bytes) -> Blocks:
    return Blocks(_pairs_of_bits(raw[:, :64])[:, None], _half(raw[:, 64:]), None, 1, 4)


# the values of a table, as bytes with 128 for zero
_IQ4: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
).view(np.uint8) ^ np.uint8(0x80)  # fmt: skip
_E2M1: Final = np.array(
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8
).view(np.uint8) ^ np.uint8(0x80)  # fmt: skip


def _iq4_nl(raw: Bytes) -> Blocks:
    return Blocks(_IQ4[_halves(raw[:, 2:])][:, None], _half(raw[:, :2]), None, 128, 8)


def _iq4_xs(raw: Bytes) -> Blocks:
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    places = np.arange(0, 16, 2, dtype=np.uint16)
    high = (np.ascontiguousarray(raw[:, 2:4]).view("<u2") >> places) & 3
    scales = (low | (high << 4)).astype(np.float32) - np.float32(32)
    codes = _IQ4[_halves(raw[:, 8:].reshape(-1, 8, 16))]
    return Blocks(codes, _half(raw[:, :2]) * scales, None, 128, 8)


def _mxfp4(raw: Bytes) -> Blocks:
    # half of the power of two that the exponent stands for: the table's values are doubled
    scales = np.exp2(raw[:, :1].astype(np.float64) - 128).astype(np.float32)
    return Blocks(_E2M1[_halves(raw[:, 1:])][:, None], scales, None, 128, 8)


FORMATS: Final[dict[str, Format]] = {
    "Q4_0": Format(18, 32, _q4_0),
    "Q4_1": Format(20, 32, _q4_1),
    "Q5_0": Format(22, 32, _q5_0),
    "Q5_1": Format(24, 32, _q5_1),
    "Q8_0": Format(34, 32, _q8_0),
    "Q2_K": Format(84, 256, _q2_k),
    "Q3_K": Format(110, 256, _q3_k),
    "Q4_K": Format(144, 256, _q4_k),
    "Q5_K": Format(176, 256, _q5_k),
    "Q6_K": Format(210, 256, _q6_k),
    "TQ2_0": Format(66, 256, _tq2_0),
    "IQ4_NL": Format(18, 32, _iq4_nl),
    "IQ4_XS": Format(136, 256, _iq4_xs),
    "MXFP4": Format(17, 32, _mxfp4),
}
