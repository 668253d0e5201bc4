"""GGUF blocks, repacked: they stand for exactly what the package `gguf` says they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from memcompile.weights.gguf_blocks import FORMATS, repack

# where a block keeps float16 numbers: random bytes there could be infinite or not a number
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108], "TQ2_0": [64], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip


def random_rows(name: str, rows: int, width: int) -> np.ndarray:
    """Rows of blocks of random bytes, with finite scales of either sign."""
    generator = np.random.default_rng(len(name) + width)
    format_ = FORMATS[name]
    blocks = generator.integers(
        0, 256, (rows * width // format_.weights, format_.block_bytes), dtype=np.uint8
    )
    for place in HALVES[name]:
        halves = generator.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        # of all exponents the smallest, which is denormal, and some whose weights are finite
        blocks[:, 0] = generator.choice([0, 1, 2, 100, 127, 250], len(blocks))
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("width", [256, 768])
@pytest.mark.parametrize("name", FORMATS)
def test_no_weight_changes_its_value(name: str, width: int) -> None:
    rows = random_rows(name, 9, width)
    expected = torch.from_numpy(dequantize(rows, GGMLQuantizationType[name]))
    found = repack(name, rows, width)
    assert found.dequantized().shape == (9, width)
    largest = expected.abs().amax()
    # an offset is moved by a multiple of the scale, and summed in float32: that may round the last bit
    tolerance = 0.0 if found.offsets is None else float(largest) * 2**-22
    torch.testing.assert_close(found.dequantized(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("name", "bits", "block"), [
    ("Q4_0", 4, 32), ("Q4_1", 4, 32), ("Q8_0", 8, 32), ("Q4_K", 4, 32), ("Q5_K", 8, 32), ("Q6_K", 8, 16),
    ("Q2_K", 4, 16), ("Q3_K", 4, 16), ("TQ2_0", 4, 256), ("IQ4_NL", 8, 32), ("IQ4_XS", 8, 32),
    ("MXFP4", 8, 32),
])  # fmt: skip
def test_codes_take_the_bits_they_need(name: str, bits: int, block: int) -> None:
    found = repack(name, random_rows(name, 3, 256), 256)
    assert found.bits == bits
    assert found.codes.shape == (3, 256 // block, block * bits // 8)
    assert found.scales.dtype == torch.float32


HALF_ONE, HALF_TWO = [0x00, 0x3C], [0x00, 0x40]
# each byte's four codes are 0, 1, 2, 3 from its lowest bits up: 32 weights of each in turn
COUNTING = [0b11100100] * 64


@pytest.mark.parametrize(("name", "block", "runs"), [
    # scale 3 * 1, minimum 1 * 2
    ("Q2_K", [0x13] * 16 + COUNTING + HALF_ONE + HALF_TWO, [-2, 1, 4, 7]),
    # bits 0 and 2 of the mask say that codes are not lowered by 4; scales 33 - 32, all
    ("Q3_K", [0b00000101] * 32 + COUNTING + [0x11] * 8 + [0xAA] * 4 + HALF_TWO,
     [0, -6, 4, -2, -8, -6, -4, -2]),
    ("TQ2_0", COUNTING + HALF_TWO, [-2, 0, 2, 4]),
])  # fmt: skip
def test_a_block_that_was_unpacked_by_hand(name: str, block: list[int], runs: list[float]) -> None:
    found = repack(name, np.array([block], np.uint8), 256).dequantized()
    expected = np.repeat(runs * (8 // len(runs)), 32).astype(np.float32)
    assert found[0].tolist() == expected.tolist()


def test_an_unknown_format_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        repack("IQ2_XXS", np.zeros((1, 66), np.uint8), 256)
