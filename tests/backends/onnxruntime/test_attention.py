"""`memcompile::attention` on GroupQueryAttention and on our kernels, against its definition in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import fx

from memcompile.artifact import TensorEntry
from memcompile.backends.onnxruntime import backend as _register  # noqa: F401
from memcompile.backends.onnxruntime.attention import padded_width
from memcompile.backends.onnxruntime.emitter import Emitter
from memcompile.backends.onnxruntime.export import to_model, write
from memcompile.backends.onnxruntime.finish import kernels_of, portable, with_kernels
from memcompile.dialect import DIALECT
from tests.backends.onnxruntime.driver import open_session

SIZES = (1, 63, 64, 65, 200)
CAPACITY = 230


@dataclass(frozen=True)
class Case:
    """Heads and attributes of one attention node."""

    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        return int(self.attributes.get("bits", 0))

    @property
    def stored(self) -> int:
        return padded_width(self.width) // (2 if self.bits == 4 else 1)


CASES = {
    "grouped": Case(),
    "one kv head": Case(heads=3, kv_heads=1),
    "as many kv heads": Case(heads=3, kv_heads=3, attributes={"scale": 0.7}),
    "heads of uneven width": Case(width=12),
    "softcap": Case(attributes={"softcap": 1.5}),
    "window": Case(attributes={"window": 9}),
    "window and sinks": Case(attributes={"window": 9, "sinks": 3}),
    "strided blocks": Case(attributes={"window": 9, "sinks": 1, "block": 8, "stride": 3, "softcap": 2.0}),
    "int8": Case(attributes={"bits": 8}),
    "int4": Case(attributes={"bits": 4}),
    "int8, window": Case(attributes={"bits": 8, "window": 9, "sinks": 3}),
    "int8 of uneven width": Case(width=12, attributes={"bits": 8}),
}

FINISHES: dict[str, Callable[[ir.Model], ir.Model]] = {
    "portable": portable,
    "kernels": lambda model: with_kernels(model, lambda _: True),
}


class _Traced(torch.nn.Module):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = Emitter(self.graph_module).run(*inputs)
        return result


def _graph(case: Case, scale: torch.Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    q, k, v, past_k, past_v, positions = (
        graph.placeholder(name) for name in ("q", "k", "v", "past_k", "past_v", "positions")
    )
    optional: dict[str, Any] = {"past_k": past_k, "past_v": past_v, "positions": positions}
    if case.bits:
        optional |= {"k_scale": graph.get_attr("scale"), "v_scale": graph.get_attr("scale")}
    attributes = {"scale": case.width**-0.5, **case.attributes}
    node = graph.call_function(torch.ops.memcompile.attention.default, (q, k, v), {**optional, **attributes})
    graph.output(tuple(graph.call_function(lambda t, i: t[i], (node, i)) for i in range(3)))
    module = torch.nn.Module()
    module.register_buffer("scale", scale)
    return fx.GraphModule(module, graph)


@functools.cache
def _model(name: str) -> tuple[ir.Model, list[TensorEntry], list[TensorEntry], torch.Tensor, torch.dtype]:
    """A case's traced model, its interface, the scales of its codes and the type of its caches."""
    case = CASES[name]
    torch.manual_seed(0)
    scale = torch.rand(case.kv_heads * case.width) * 0.02 + (0.02 if case.bits == 8 else 0.3)
    dtype = {0: torch.float32, 8: torch.int8, 4: torch.uint8}[case.bits]
    cache = ("batch", case.kv_heads, "capacity", case.stored)
    entries = [
        TensorEntry("q", "float32", ("batch", case.heads, "tokens", case.width)),
        TensorEntry("k", "float32", ("batch", case.kv_heads, "tokens", case.width)),
        TensorEntry("v", "float32", ("batch", case.kv_heads, "tokens", case.width)),
        TensorEntry("past_k", str(dtype).removeprefix("torch."), cache),
        TensorEntry("past_v", str(dtype).removeprefix("torch."), cache),
        TensorEntry("positions", "int64", ("batch", "slots")),
    ]
    outputs = [
        TensorEntry("out", "float32", ("batch", case.heads, "tokens", case.width)),
        TensorEntry("present_k", entries[3].dtype, cache),
        TensorEntry("present_v", entries[3].dtype, cache),
    ]
    sizes = {"batch": 2, "tokens": 5, "capacity": 21, "slots": 11}
    examples = [
        torch.zeros([d if isinstance(d, int) else sizes[d] for d in e.dims], dtype=getattr(torch, e.dtype))
        for e in entries
    ]
    return to_model(_Traced(_graph(case, scale)), entries, outputs, examples), entries, outputs, scale, dtype


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("name", CASES)
def test_chunks_then_single_tokens_agree_with_the_definition(name: str, finish: str, tmp_path: Path) -> None:
    model, entries, outputs, scale, dtype = _model(name)
    torch.manual_seed(0)
    finished = FINISHES[finish](model)
    assert bool(kernels_of(finished)) == (finish == "kernels")
    write(finished, tmp_path / "model.onnx", entries, outputs)
    session = open_session(tmp_path / "model.onnx")
    for first in SIZES:
        _run(session, CASES[name], scale, dtype, [first, 1, 7, 1])


def _run(session: Any, case: Case, scale: torch.Tensor, dtype: torch.dtype, calls: list[int]) -> None:
    poison = np.full((1, case.kv_heads, CAPACITY, case.stored), 77 if case.bits else np.nan)
    buffers = [
        onnxruntime.OrtValue.ortvalue_from_numpy(poison.astype(str(dtype).removeprefix("torch.")))
        for _ in range(2)
    ]
    codes = DIALECT["attention"].definition
    width = (case.width + 1) // 2 if case.bits == 4 else case.width
    state = [
        torch.zeros(1, case.kv_heads, 0, width, dtype=torch.float64 if not case.bits else dtype)
        for _ in range(2)
    ]
    used = 0
    for tokens in calls:
        q = torch.randn(1, case.heads, tokens, case.width)
        k, v = (torch.randn(1, case.kv_heads, tokens, case.width) for _ in range(2))
        used += tokens
        positions = torch.arange(used).unsqueeze(0)
        attributes = {"scale": case.width**-0.5, **case.attributes}
        scales = (scale.double(), scale.double()) if case.bits else (None, None)
        expected, *state = codes(
            q.double(), k.double(), v.double(), *state, positions, None, *scales, **attributes
        )
        binding = session.io_binding()
        for name, value in {"q": q, "k": k, "v": v, "positions": positions}.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()))
        for name, buffer in zip("kv", buffers, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        binding.bind_output("out")
        session.run_with_iobinding(binding)
        got = binding.get_outputs()[2].numpy()
        # a value half way between two codes may round to either
        atol = {0: 1e-5, 8: 2e-2, 4: 2e-1}[case.bits]
        np.testing.assert_allclose(got, expected.numpy(), atol=atol)
        if case.bits and case.width == padded_width(case.width):
            held = buffers[0].numpy()[:, :, :used]
            assert (held == state[0].numpy()).mean() > 0.999
