"""AMX: the kernel compiles to the instructions, and gives the right numbers on a model of the tiles.

No test here runs on AMX: the model stands in for the hardware, with the rounding that Intel documents.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from memcompile.dialect import cpu_attention
from memcompile.kernels import KernelLibrary
from memcompile.kernels.build import AMX, FLAGS, INSTRUCTION_SETS, SOURCES, find_compiler
from tests.kernels.test_attention import MASKS, TOLERANCE, close, definition, make, run

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
COMPILED = ("-DMC_ISA=amx", "-O1", f"-I{SOURCES}")
MODEL = (*INSTRUCTION_SETS["avx2"], "-DMC_AMX", "-DMC_AMX_MODEL")
EXPORTS = """
#include "prefill_amx.h"
#include "attention.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
namespace amx { int32_t attention(const McAttention &); }
EXPORT int32_t mc_attention(const McAttention *call) { return amx::attention(*call); }
EXPORT const char *mc_reason(int32_t) { return "refused"; }
using amx::tiles;
EXPORT void multiply(float *c, const void *a, const void *b) {
    amx::tiles_begin();
    TILE_LOAD(0, c, 64);
    TILE_LOAD(1, a, 64);
    TILE_LOAD(2, b, 64);
    TILE_MULTIPLY(0, 1, 2);
    TILE_STORE(0, c, 64);
    amx::tiles_end();
}
"""


def compile_(arguments: list[str]) -> None:
    done = subprocess.run([str(find_compiler()), *FLAGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def handle(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of the instruction set "amx" over the model, for processors with AVX2."""
    folder = tmp_path_factory.mktemp("amx")
    (folder / "exports.cpp").write_text(EXPORTS, encoding="utf-8")
    sources = [str(SOURCES / "kernels.cpp"), str(folder / "exports.cpp")]
    compile_([*MODEL, *COMPILED, "-shared", *sources, "-o", str(folder / "amx.so")])
    loaded = ctypes.CDLL(str(folder / "amx.so"))
    loaded.mc_attention.restype = ctypes.c_int32
    loaded.mc_reason.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def model(handle: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    library = KernelLibrary(Path("amx.so"), handle)
    monkeypatch.setattr(cpu_attention, "cpu_library", lambda: library)


def test_the_kernel_compiles_to_the_instructions(tmp_path: Path) -> None:
    assembly = tmp_path / "kernels.s"
    compile_([*AMX, *COMPILED, "-S", str(SOURCES / "kernels.cpp"), "-o", str(assembly)])
    text = assembly.read_text(encoding="utf-8")
    for instruction in ("ldtilecfg", "tileloadd", "tilezero", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in text


def bits_of(x: np.ndarray) -> np.ndarray:
    """bfloat16 values, given as float32, as what a tile holds."""
    bits: np.ndarray = (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits


def multiply(handle: ctypes.CDLL, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c [16,16] plus a [16,32] times b [32,16], by one instruction."""
    out = np.ascontiguousarray(c, np.float32).copy()
    pairs = bits_of(b).reshape(16, 2, 16).transpose(0, 2, 1)
    handle.multiply(
        *(x.ctypes.data_as(ctypes.c_void_p) for x in (out, bits_of(a), np.ascontiguousarray(pairs)))
    )
    return out


def test_the_model_rounds_as_the_instruction_does(handle: ctypes.CDLL) -> None:
    random = np.random.default_rng(0)
    # few exponents: every product and sum is exact in float64 before it is rounded
    sizes = ((16, 32), (32, 16))
    a, b = ((random.uniform(1, 2, s) * random.choice([-1, 1], s)).astype(np.float32) for s in sizes)
    a, b = ((x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in (a, b))
    c = random.uniform(-9, 9, (16, 16)).astype(np.float32)
    sums = np.zeros((2, 16, 16), np.float32)
    for k in range(32):
        exact = sums[k % 2].astype(np.float64) + np.outer(a[:, k].astype(np.float64), b[k].astype(np.float64))
        sums[k % 2] = exact.astype(np.float32)
    np.testing.assert_array_equal(multiply(handle, c, a, b), c + (sums[0] + sums[1]))


def test_the_model_flushes_denormals(handle: ctypes.CDLL) -> None:
    tiny = np.float32(2.0**-127)
    ones, zeros = np.zeros((16, 32), np.float32), np.zeros((16, 16), np.float32)
    ones[:, 0] = 1
    b = np.zeros((32, 16), np.float32)
    b[0] = tiny
    assert (multiply(handle, zeros, ones, b) == 0).all()  # an input
    ones[:, 0], b[0] = 2.0**-64, 2.0**-64
    assert (multiply(handle, zeros, ones, b) == 0).all()  # a product
    assert (multiply(handle, zeros + tiny, ones * 0, b) == 0).all()  # what was there


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65, 200])
def test_prefill_in_tiles_agrees_with_the_definition(tokens: int, mask: str) -> None:
    q, k, v = make(tokens, tokens, dtype=torch.bfloat16)
    close(run(q, k, v, **MASKS[mask]), definition(q, k, v, **MASKS[mask]), TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
def test_every_head_width_and_tile_of_keys(width: int) -> None:
    q, k, v = make(70, 150, width=width, dtype=torch.bfloat16)
    positions = torch.arange(150).unsqueeze(0)
    expected = definition(q, k, v, positions=positions)
    for key_tile in (16, 64, 128):
        out = run(q, k, v, positions=positions, key_tile=key_tile)
        close(out, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("model")
def test_empty_slots_may_hold_nan_and_blocks_are_skipped() -> None:
    q, k, v = make(130, 200, dtype=torch.bfloat16)
    positions = torch.arange(200).unsqueeze(0).repeat(2, 1)
    positions[0, :3] = positions[1, 20:60] = -1
    for x in (k, v):
        x.masked_fill_((positions < 0)[:, None, :, None], float("nan"))
    clean = [x.nan_to_num() for x in (k, v)]
    blocks = torch.ones(2, 4, 5, 7, dtype=torch.bool).tril(2)
    blocks[:, 1, :, 1] = False
    mask = blocks.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :130, :200]
    out = run(q, k, v, positions=positions, blocks=blocks, block_tokens=32)
    close(out, definition(q, *clean, positions=positions, mask=mask), TOLERANCE[torch.bfloat16])
