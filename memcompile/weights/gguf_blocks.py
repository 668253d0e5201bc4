"""GGUF's blocks as the dialect's: every code and scale of the file keeps its value.

Formats: ggml's Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (blocks of 32) and Q4_K, Q5_K, Q6_K (super-blocks of 256 whose
parts have scales of their own). Scales are float16 in the file, and their products with the integer scales of
the K formats are float32 here, as ggml computes them. Codes of 5 and 6 bits take 8.
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


FORMATS: Final[dict[str, Format]] = {
    "Q4_0": Format(18, 32, _q4_0),
    "Q4_1": Format(20, 32, _q4_1),
    "Q5_0": Format(22, 32, _q5_0),
    "Q5_1": Format(24, 32, _q5_1),
    "Q8_0": Format(34, 32, _q8_0),
    "Q4_K": Format(144, 256, _q4_k),
    "Q5_K": Format(176, 256, _q5_k),
    "Q6_K": Format(210, 256, _q6_k),
}
