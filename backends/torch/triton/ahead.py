"""Compile the kernels for a GPU that need not be here, and tell what they take of it.

python -m memcompile.backends.torch.triton.ahead            # the table of docs/backends/cuda.md
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memcompile.backends.torch.triton import launch
from memcompile.backends.torch.triton.decode import decode_kernel, merge_kernel
from memcompile.backends.torch.triton.prefill import prefill_kernel

ARCHITECTURES: Final = (80, 90)
# what one program may take at most, KiB (CUDA C++ programming guide, compute capabilities)
SHARED_KIB: Final = {80: 163, 86: 99, 89: 99, 90: 227}
_NAMES: Final = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8"
}  # fmt: skip
_POINTERS: Final = {
    "lse": "fp32", "partial": "fp32", "partial_lse": "fp32", "k_scale": "fp32", "v_scale": "fp32",
    "q_positions": "i64", "k_positions": "i64", "visits": "i32", "counts": "i32", "slots": "i32",
    "mask": "u8",
}  # fmt: skip
_FLOATS: Final = ("scale", "softcap")
# what a caller's tensors are when they come from an allocator and heads are a multiple of 16 wide
_ALIGNED: Final = re.compile(r"^[qkv]_[bhgtn]$")


_CAUSAL: Final = launch.Rule(1.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it would be compiled for a call: types, widths, and the rule of who sees whom."""

    kernel: str
    dtype: torch.dtype
    width: int
    cache: torch.dtype | None = None
    repeats: int = 4
    tokens: int = 1
    rule: launch.Rule = _CAUSAL
    chosen: bool = False
    mask: str = "none"
    block_mask: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel and what one program of it takes."""

    cubin: bytes
    shared_bytes: int
    registers: int
    spilled_bytes: int


def compile_ahead(variant: Variant, architecture: int) -> Compiled:
    """Compile for compute capability `architecture` (80, 90, ...) to machine code with Triton's own ptxas."""
    function, constants, tile = _instance(variant)
    cache = variant.cache or variant.dtype
    types = {"q": variant.dtype, "out": variant.dtype, "k": cache, "v": cache}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types or name in _POINTERS:
            signature[name] = "*" + (_NAMES[types[name]] if name in types else _POINTERS[name])
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
            if _ALIGNED.match(name):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = _resources(done.asm["ptx"], architecture)
    return Compiled(done.asm["cubin"], done.metadata.shared, registers, spilled)


def _instance(variant: Variant) -> tuple[Any, dict[str, Any], launch.Tile]:
    """The kernel, its compile-time arguments and its tile, as `launch.py` would choose them."""
    width, bytes_each = variant.width, variant.dtype.itemsize
    padded = launch.padded(width)
    if variant.kernel == "merge":
        return merge_kernel, {"DV": width, "BLOCK_DV": padded}, launch.Tile(1, 1, 4, 1)
    constants = variant.rule.constants() | {
        "REPEATS": variant.repeats, "D": width, "DV": width, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BITS": 8 if variant.cache == torch.int8 else 0,
    }  # fmt: skip
    if variant.kernel == "decode":
        tile = launch.decode_tile(variant.repeats * variant.tokens, width, bytes_each)
        return (
            decode_kernel,
            constants | {"ROWS": tile.rows, "BLOCK_N": tile.keys, "CHOSEN": variant.chosen},
            tile,
        )
    tile = launch.prefill_tile(width, bytes_each, block_mask=variant.block_mask)
    return (
        prefill_kernel,
        constants | {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "MASK": variant.mask},
        tile,
    )


def _resources(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers a thread, and bytes a thread spills, from the assembler's own report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        name = f"sm_{architecture}" + ("a" if architecture == 90 else "")
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", path, "-o", f"{path}.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert used is not None
    return int(used[1]), int(spilled[1]) if spilled else 0


VARIANTS: Final = (
    Variant("prefill", torch.bfloat16, 64),
    Variant("prefill", torch.bfloat16, 128),
    Variant("prefill", torch.float16, 128, block_mask=True),
    Variant("prefill", torch.bfloat16, 256, rule=launch.Rule(1.0, window=512)),
    Variant("prefill", torch.float32, 64, rule=launch.Rule(1.0, window=1024, sinks=4)),
    Variant("prefill", torch.float32, 128, rule=launch.Rule(1.0, softcap=50.0)),
    Variant("prefill", torch.float32, 256),
    Variant("prefill", torch.float16, 128, cache=torch.int8),
    Variant("decode", torch.bfloat16, 64),
    Variant("decode", torch.bfloat16, 128),
    Variant("decode", torch.bfloat16, 128, cache=torch.int8),
    Variant("decode", torch.float16, 128, chosen=True),
    Variant("decode", torch.float32, 64, rule=launch.Rule(1.0, window=1024, sinks=4)),
    Variant("decode", torch.float32, 256, repeats=8, tokens=2),
    Variant("decode", torch.bfloat16, 256, repeats=8, tokens=8),
    Variant("merge", torch.bfloat16, 128),
)


def main() -> None:
    """Print one row a variant and architecture."""
    print("| kernel | type | width | | sm | registers | spilled bytes | shared KiB |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        for architecture in ARCHITECTURES:
            got = compile_ahead(variant, architecture)
            print(
                f"| {variant.kernel} | {_NAMES[variant.dtype]} | {variant.width} | {describe(variant)} | "
                f"{architecture} | {got.registers} | {got.spilled_bytes} | {got.shared_bytes / 1024:.1f} |",
                flush=True,
            )


def describe(variant: Variant) -> str:
    """What is special about a variant, in a few words."""
    words = []
    if variant.cache is not None:
        words.append(f"{_NAMES[variant.cache]} cache")
    if variant.rule.window:
        words.append("window" + (" and sinks" if variant.rule.sinks else ""))
    if variant.rule.softcap:
        words.append("soft cap")
    if variant.chosen:
        words.append("chosen slots")
    if variant.block_mask:
        words.append("block mask")
    if variant.kernel == "decode":
        words.append(f"{variant.repeats * variant.tokens} rows")
    return ", ".join(words)


if __name__ == "__main__":
    main()
