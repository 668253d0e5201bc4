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
    "Q6_K": [208],
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
])  # fmt: skip
def test_codes_take_the_bits_they_need(name: str, bits: int, block: int) -> None:
    found = repack(name, random_rows(name, 3, 256), 256)
    assert found.bits == bits
    assert found.codes.shape == (3, 256 // block, block * bits // 8)
    assert found.scales.dtype == torch.float32


def test_an_unknown_format_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        repack("IQ2_XXS", np.zeros((1, 66), np.uint8), 256)
