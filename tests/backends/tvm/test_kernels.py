"""The TVMScript kernels against their definitions in float64, at sizes around the tiles' edges."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import tvm

from memcompile.backends.tvm.build import cpu_target
from memcompile.backends.tvm.kernels import AttentionSizes, attention_kernel, linear_kernel
from memcompile.dialect import attention_definition
from memcompile.dialect.cache_codes import code_width, quantize

TOLERANCE = 3e-6  # scores of size 5, weights that sum to 1
SPLITS = ((0, 1), (0, 63), (0, 64), (0, 65), (1, 1), (62, 2), (64, 1), (65, 70), (200, 3))


def compiled(kernel: Any) -> Any:
    """The kernel as a function of tensors."""
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=cpu_target())["main"]


@pytest.mark.parametrize(("width", "features"), [(1, 1), (15, 5), (16, 4), (17, 3), (50, 33)])
def test_linear_agrees_with_its_definition(width: int, features: int) -> None:
    run = compiled(linear_kernel(width, features))
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(features, width, generator=generator)
    for rows in (1, 3, 4, 5, 63, 64, 65):
        x = torch.randn(rows, width, generator=generator)
        out = tvm.runtime.tensor(np.full((rows, features), np.nan, np.float32))
        run(tvm.runtime.tensor(x.numpy()), tvm.runtime.tensor(weight.numpy()), out)
        np.testing.assert_allclose(out.numpy(), (x.double() @ weight.double().T).numpy(), atol=1e-5)


@functools.cache
def attention_of(sizes: AttentionSizes) -> Any:
    """The compiled attention kernel of some sizes."""
    return compiled(attention_kernel(sizes))


class Case:
    """Attention over `past` cached and `new` tokens, in caches with room to spare, which is poisoned."""

    def __init__(self, sizes: AttentionSizes, batch: int = 2) -> None:
        self.sizes, self.batch = sizes, batch
        self.run = attention_of(sizes)
        self.random = torch.Generator().manual_seed(7)
        scale = {0: 0.0, 8: 0.04, 4: 0.5}[sizes.bits]
        self.scales = [
            scale * (0.5 + torch.rand(sizes.kv_heads * width, generator=self.random))
            for width in (sizes.width, sizes.value_width)
            if sizes.bits
        ]

    def made(self, *shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random) * size

    def check(
        self, past: int, new: int, *, positions: torch.Tensor | None = None, size: float = 1.0
    ) -> np.ndarray:
        """Compare output and caches with the definition; `positions` are those of all slots."""
        s, batch, total = self.sizes, self.batch, past + new
        q = self.made(batch, s.heads, new, s.width, size=size)
        k, v = (self.made(batch, s.kv_heads, new, w) for w in (s.width, s.value_width))
        if positions is None:
            positions = torch.arange(total).repeat(batch, 1)
        old = [self.made(batch, s.kv_heads, past, w) for w in (s.width, s.value_width)]
        if s.bits:
            old = [quantize(x, scale, s.bits) for x, scale in zip(old, self.scales, strict=True)]
        caches = []
        for kept, width in zip(old, (s.width, s.value_width), strict=True):
            shape = (batch, s.kv_heads, total + 5, code_width(s.bits, width) if s.bits else width)
            # a kernel must not read what it has not written
            cache = np.full(shape, 77 if s.bits else np.nan, kept.numpy().dtype)
            cache[:, :, :past] = kept.numpy()
            # nor what its positions call empty
            if not s.bits:
                cache[:, :, :past][(positions[:, :past] < 0).numpy()[:, None].repeat(s.kv_heads, 1)] = np.nan
            caches.append(tvm.runtime.tensor(cache))
        out = tvm.runtime.tensor(np.full((batch, s.heads, new, s.value_width), np.nan, np.float32))
        first = np.full(batch, past, np.int64)
        queries = positions[:, past:].contiguous()
        given = [x.numpy() for x in (q, k, v)], [x.numpy() for x in (positions.contiguous(), queries)]
        self.run(
            *map(tvm.runtime.tensor, given[0]), *caches, *map(tvm.runtime.tensor, given[1]),
            tvm.runtime.tensor(first), *(tvm.runtime.tensor(x.numpy()) for x in self.scales), out,
        )  # fmt: skip
        wide = [x if s.bits else x.double() for x in old]
        expected, keys, values = attention_definition(
            q.double(), k.double(), v.double(), *wide, positions, None, *self.scales,
            scale=s.scale, causal=s.causal, window=s.window, sinks=s.sinks, block=s.block, stride=s.stride,
            softcap=s.softcap, bits=s.bits,
        )  # fmt: skip
        np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=TOLERANCE)
        for cache, present in zip(caches, (keys, values), strict=True):
            np.testing.assert_array_equal(cache.numpy()[:, :, past:total], present[:, :, past:].numpy())
        result: np.ndarray = out.numpy()
        return result


@pytest.mark.parametrize(
    "sizes",
    [
        AttentionSizes(4, 2, 16, 16, 0.25),
        AttentionSizes(3, 1, 20, 12, 0.3, softcap=0.5),
        AttentionSizes(5, 5, 80, 80, 0.1, window=8, sinks=2),
        AttentionSizes(6, 2, 8, 8, 0.3, window=8, sinks=2, block=4, stride=3),
        AttentionSizes(4, 2, 17, 17, 0.25, bits=8),
        AttentionSizes(4, 2, 18, 18, 0.25, bits=4),
        AttentionSizes(4, 2, 17, 17, 0.25, bits=4),
    ],
    ids=str,
)
def test_attention_agrees_with_its_definition(sizes: AttentionSizes) -> None:
    case = Case(sizes)
    for past, new in SPLITS:
        case.check(past, new)


def test_empty_slots_are_not_seen_and_not_read() -> None:
    positions = torch.arange(90).repeat(2, 1)
    positions[0, 3:40] = -1
    positions[1, 0:70] = -1
    Case(AttentionSizes(4, 2, 16, 16, 0.25)).check(85, 5, positions=positions)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    positions = torch.arange(10).repeat(2, 1)
    positions[1] = -1
    out = Case(AttentionSizes(4, 2, 16, 16, 0.25)).check(6, 4, positions=positions)
    assert (out[1] == 0).all()
    assert (out[0] != 0).any()


def test_extreme_scores_do_not_overflow() -> None:
    Case(AttentionSizes(4, 2, 16, 16, 0.25)).check(70, 3, size=1e4)


def test_two_threads_give_what_one_gives() -> None:
    set_threads = tvm.get_global_func("runtime.config_threadpool")
    results = []
    for threads in (1, 2):
        set_threads(1, threads)
        results.append(Case(AttentionSizes(6, 2, 16, 16, 0.25)).check(65, 70))
    set_threads(1, 1)
    np.testing.assert_array_equal(*results)
