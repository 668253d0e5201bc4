"""The Triton kernels compiled to machine code for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'memcompile[triton]'")

from memcompile.backends.torch.triton.ahead import (
    ARCHITECTURES,
    SHARED_KIB,
    VARIANTS,
    Variant,
    compile_ahead,
    describe,
)

pytestmark = pytest.mark.xdist_group("triton compiler")


def label(variant: Variant) -> str:
    words = (variant.kernel, str(variant.dtype).removeprefix("torch."), str(variant.width), describe(variant))
    return " ".join(words).strip()


# float32 takes longest to compile and is nobody's choice on a GPU: once is enough here
INSTANCES = [(v, a) for v in VARIANTS for a in ARCHITECTURES if a == 80 or v.dtype != torch.float32]


@pytest.mark.parametrize(
    ("variant", "architecture"), INSTANCES, ids=lambda x: label(x) if isinstance(x, Variant) else f"sm_{x}"
)
def test_kernel_compiles_to_a_cubin_that_fits_the_device(
    variant: Variant, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    got = compile_ahead(variant, architecture)
    taken = f"{got.registers} registers, {got.spilled_bytes} bytes spilled, {got.shared_bytes} bytes shared"
    print(f"sm_{architecture} {label(variant)}: {taken}, cubin of {len(got.cubin)} bytes")
    assert got.cubin[:4] == b"\x7fELF"
    # what one program may have on the device; on sm_80 also on its smaller relatives
    assert got.shared_bytes <= (SHARED_KIB[86] if architecture == 80 else SHARED_KIB[90]) * 1024
    assert 0 < got.registers <= 255
    # a tile that does not fit the registers shows here, as kilobytes
    assert got.spilled_bytes <= 160
