"""CUDA: sources of all kernels compiled for sm_80, the attention kernel emulated. Nothing runs on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import tvm

from memcompile.backends.tvm import build
from memcompile.backends.tvm.build import compile_cubin, cuda_source, cuda_target, find_nvcc
from memcompile.backends.tvm.kernels import AttentionSizes, cuda_attention_kernel
from memcompile.dialect import attention_definition
from memcompile.dialect.cache_codes import code_width, quantize
from memcompile.errors import MemcompileError
from memcompile.lowering import get_backend
from memcompile.program import build_program
from tests.backends.tvm.emulate import Emulated
from tests.models import captured_tiny

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc, of the CUDA toolkit")


def attention_source(sizes: AttentionSizes) -> str:
    kernel = cuda_attention_kernel(sizes).with_attr("global_symbol", "attention")
    return cuda_source(tvm.compile(tvm.IRModule({"attention": kernel}), target=cuda_target()))


@needs_nvcc
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_program_becomes_cuda_source_and_a_cubin(family: str, tmp_path: Path) -> None:
    program = build_program(captured_tiny(family))
    lowered = get_backend("tvm").lower(program, tmp_path, device="cuda", progress=lambda _: None)
    assert set(lowered.files) == {"model.so", "kernels.cu", "weights.safetensors"}
    source = (tmp_path / "kernels.cu").read_text(encoding="utf-8")
    # appending and attending; llama's layers share them
    assert source.count("__global__ void __launch_bounds__(128) step_attention") >= 2
    compile_cubin(tmp_path / "kernels.cu", tmp_path / "kernels.cubin")
    cubin = (tmp_path / "kernels.cubin").read_bytes()
    assert cubin[:4] == b"\x7fELF"
    assert b"step_attention" in cubin


@needs_nvcc
def test_source_that_nvcc_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text("this is not CUDA", encoding="utf-8")
    with pytest.raises(MemcompileError, match="MC901 nvcc refuses the kernels"):
        compile_cubin(tmp_path / "bad.cu", tmp_path / "bad.cubin")


def test_a_missing_nvcc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(MemcompileError, match="MC115 nvcc, NVIDIA's compiler, was not found"):
        compile_cubin(tmp_path / "kernels.cu", tmp_path / "kernels.cubin")


@pytest.mark.parametrize(
    "sizes",
    [
        AttentionSizes(4, 2, 16, 16, 0.25),
        AttentionSizes(3, 1, 130, 140, 0.1, window=8, sinks=2, softcap=0.5),
        AttentionSizes(2, 1, 17, 17, 0.25, bits=8),
        AttentionSizes(2, 1, 17, 17, 0.25, bits=4),
    ],
    ids=str,
)
def test_the_attention_kernel_emulated_agrees_with_its_definition(
    sizes: AttentionSizes, tmp_path: Path
) -> None:
    s, batch, past, new = sizes, 2, 130, 2
    emulated = Emulated(attention_source(sizes), tmp_path)
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q = made(batch, s.heads, new, s.width)
    k, v = (made(batch, s.kv_heads, new, w) for w in (s.width, s.value_width))
    old = [made(batch, s.kv_heads, past, w) for w in (s.width, s.value_width)]
    scales = [torch.rand(s.kv_heads * w, generator=generator) * 0.3 + 0.1 for w in (s.width, s.value_width)]
    if s.bits:
        old = [quantize(x, scale, s.bits) for x, scale in zip(old, scales, strict=True)]
    positions = torch.arange(past + new).repeat(batch, 1)
    positions[1, :50] = -1
    arrays = {
        "q": q, "k": k, "v": v, "positions": positions, "query_at": positions[:, past:].contiguous(),
        "first_slots": torch.full((batch,), past), "k_scale": scales[0], "v_scale": scales[1],
        "out": torch.full((batch, s.heads, new, s.value_width), torch.nan),
    }  # fmt: skip
    for name, kept, width in zip(("cache_k", "cache_v"), old, (s.width, s.value_width), strict=True):
        stored = code_width(s.bits, width) if s.bits else width
        # a kernel must not read what it has not written, nor what is empty
        arrays[name] = torch.full(
            (batch, s.kv_heads, past + new + 3, stored), 77 if s.bits else torch.nan, dtype=kept.dtype
        )
        arrays[name][:, :, :past] = kept
        if not s.bits:
            arrays[name][1, :, :50] = torch.nan
    values = {f"{name}_ptr": tensor.data_ptr() for name, tensor in arrays.items()}
    values |= {"slots": past + new + 3, "shown": past + new, "t_count": new, "batch": batch}
    for name, parameters in emulated.parameters.items():
        # sizes that the compiler worked out are products of these
        heads = s.heads if any(n == "out_ptr" for n, _ in parameters) else s.kv_heads
        derived = {n: 0 for n, pointer in parameters if not pointer and n not in values}
        emulated.run(name, batch * heads * new, {**derived, **values})
    expected, keys, codes = attention_definition(
        q.double(), k.double(), v.double(), *(x if s.bits else x.double() for x in old), positions, None,
        *(scales if s.bits else ()), scale=s.scale, window=s.window, sinks=s.sinks,
        softcap=s.softcap, bits=s.bits,
    )  # fmt: skip
    np.testing.assert_allclose(arrays["out"].numpy(), expected.numpy(), atol=3e-6)
    for name, present in (("cache_k", keys), ("cache_v", codes)):
        written = arrays[name][:, :, past : past + new]
        np.testing.assert_array_equal(written.numpy(), present[:, :, past:].numpy())
