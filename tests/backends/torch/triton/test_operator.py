"""How the kernels come under `memcompile::attention`: for CUDA tensors, lazily, and only where triton is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memcompile.backends.torch.triton as kernels
from memcompile.dialect import attention, attention_definition

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'memcompile[triton]'"
)


def zeros(heads: int, tokens: int, width: int = 16) -> torch.Tensor:
    return torch.zeros(1, heads, tokens, width)


@needs_triton
def test_the_torch_backend_registers_a_cuda_kernel_without_importing_triton(repository: Path) -> None:
    statement = """
import sys
import torch
import memcompile.dialect
def registered():
    return torch._C._dispatch_has_kernel_for_dispatch_key("memcompile::attention", "CUDA")
assert not registered()
import memcompile.backends.torch
assert registered()
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", statement], cwd=repository, check=True)


def test_without_triton_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(attention, "register_kernel", lambda *_: pytest.fail("registered"))
    assert kernels.register_cuda() is False


def test_cpu_tensors_do_not_meet_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import memcompile.backends.torch  # noqa: F401  (registers)

    monkeypatch.setattr(kernels, "_first_call", lambda *_, **__: pytest.fail("called"))
    q, k, v = (torch.randn(1, h, 5, 16) for h in (2, 1, 1))
    out, _, _ = attention(q, k, v, scale=0.25)
    torch.testing.assert_close(out, attention_definition(q, k, v, scale=0.25)[0], atol=1e-6, rtol=1e-6)


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 3).double()}, "queries of type torch.float64"),
        ({"k": zeros(1, 3).int()}, "keys and values of types torch.int32"),
        ({"q": zeros(3, 3), "k": zeros(2, 3), "v": zeros(2, 3)}, "3 query heads for 2 key/value heads"),
        ({"v": zeros(1, 3, 512)}, "head widths 16, 16 and 512"),
        ({"v": zeros(1, 4)}, r"keys \(1, 1, 3, 16\), values \(1, 1, 4, 16\)"),
        ({"positions": torch.zeros(1, 4)}, r"key positions \(1, 4\) for 1 rows of 3"),
        ({"k": zeros(1, 3).char(), "v": zeros(1, 3).char()}, "need k_scale and v_scale"),
        ({"block_mask": zeros(1, 2, 1)}, r"block_mask covers \(2, 1\) blocks, the tensors have \(1, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_shapes_and_types_that_the_kernels_do_not_take_are_refused(
    change: dict[str, Any], message: str
) -> None:
    from memcompile.backends.torch.triton.launch import Keys, Rule, prefill

    given = {name: zeros(heads, 3) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    given |= {"positions": torch.arange(3).unsqueeze(0)} | change
    keys = Keys(given["k"], given["v"], given["positions"])
    with pytest.raises(ValueError, match=message):
        prefill(given["q"], torch.arange(3).unsqueeze(0), keys, Rule(1.0), block_mask=given.get("block_mask"))


@needs_triton
def test_decode_refuses_more_rows_than_its_tile_takes() -> None:
    from memcompile.backends.torch.triton.launch import Keys, Rule, decode

    q, k = torch.zeros(1, 4, 5, 16), torch.zeros(1, 1, 9, 16)
    positions = torch.arange(9).unsqueeze(0)
    with pytest.raises(ValueError, match="20 rows of queries a key/value head; decode takes 16"):
        decode(q, positions[:, 4:], Keys(k, k, positions), Rule(1.0))


@needs_triton
def test_keys_are_split_to_fill_the_device_but_not_into_crumbs() -> None:
    from memcompile.backends.torch.triton.launch import split_count

    assert split_count(keys=32768, programs=8, processors=108) == 27
    assert split_count(keys=1024, programs=8, processors=108) == 4
    assert split_count(keys=32768, programs=512, processors=108) == 1
    assert split_count(keys=0, programs=8, processors=108) == 1


@pytest.mark.needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("rule", [{}, {"window": 100, "sinks": 4}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_on_the_device_the_operator_agrees_with_the_definition(
    dtype: torch.dtype, bits: int, rule: dict[str, Any], width: int
) -> None:
    import memcompile.backends.torch  # noqa: F401  (registers)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    generator = torch.Generator().manual_seed(width)
    code = torch.int8 if bits else dtype
    scales = [torch.full((2 * width,), 0.03, device="cuda") if bits else None for _ in "kv"]
    got = tuple(torch.zeros(2, 2, 0, width, dtype=code, device="cuda") for _ in "kv")
    want = got
    total = 0
    for tokens in (777, 1, 3):
        q, k, v = (torch.randn(2, h, tokens, width, generator=generator).to("cuda", dtype) for h in (8, 2, 2))
        total += tokens
        positions = torch.arange(total, device="cuda").repeat(2, 1)
        given = {
            "positions": positions,
            "k_scale": scales[0],
            "v_scale": scales[1],
            "bits": bits,
            "scale": 0.1,
        }
        out, *got = attention(q, k, v, *got, **given, **rule)
        expected, *want = attention_definition(q.double(), k.double(), v.double(), *want, **given, **rule)
        want = [x.to(code) for x in want]
        torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=tolerance)
