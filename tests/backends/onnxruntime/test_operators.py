"""Each dialect operator, lowered, agrees with its definition in float64 at sizes around the edges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from memcompile.artifact import TensorEntry
from memcompile.backends.onnxruntime import backend as _register  # noqa: F401
from memcompile.backends.onnxruntime.emitter import Emitter
from memcompile.backends.onnxruntime.export import to_model, write
from memcompile.dialect import DIALECT
from tests.backends.onnxruntime.driver import open_session

SIZES = (1, 63, 64, 65, 200)
Run = Callable[..., np.ndarray]


class _Emitted(torch.nn.Module):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = Emitter(self.graph_module).run(*inputs)
        return (result,)


def compiled(
    function: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor],
    dims: dict[str, tuple[int | str, ...]],
    folder: Path,
) -> Run:
    """`function` of dialect operators as an ONNX session over inputs with the given dims."""
    graph_module = fx.symbolic_trace(function)
    entries = [
        TensorEntry(name, str(value.dtype).removeprefix("torch."), dims[name])
        for name, value in inputs.items()
    ]
    rank = function(*inputs.values()).ndim
    outputs = [TensorEntry("result", "float32", tuple(f"d{i}" for i in range(rank)))]
    model = to_model(_Emitted(graph_module), entries, outputs, list(inputs.values()))
    write(model, folder / "model.onnx", entries, outputs)
    session = open_session(folder / "model.onnx")

    def run(*values: torch.Tensor) -> np.ndarray:
        feeds = dict(zip(inputs, [v.numpy() for v in values], strict=True))
        result: np.ndarray = session.run(None, feeds)[0]
        return result

    return run


def _wide(values: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [v.double() if v.is_floating_point() else v for v in values]


def test_rms_norm(tmp_path: Path) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.memcompile.rms_norm.default(x, weight, 1e-6)

    dims: dict[str, tuple[int | str, ...]] = {"x": ("batch", "tokens", 24), "weight": (24,)}
    run = compiled(function, {"x": torch.randn(2, 5, 24), "weight": torch.ones(24)}, dims, tmp_path)
    for tokens in SIZES:
        values = (torch.randn(1, tokens, 24) * 30, torch.randn(24))
        expected = DIALECT["rms_norm"].definition(*_wide(values), 1e-6)
        np.testing.assert_allclose(run(*values), expected.numpy(), rtol=2e-5, atol=1e-5)


def test_rotary(tmp_path: Path) -> None:
    def function(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        both = torch.ops.aten.cat.default([angles, angles], -1)
        cos, sin = torch.ops.aten.cos.default(both), torch.ops.aten.sin.default(both)
        heads = torch.ops.aten.transpose.int(x, 1, 2)
        return torch.ops.memcompile.rotary.default(heads, cos, sin)

    dims: dict[str, tuple[int | str, ...]] = {
        "x": ("batch", "tokens", 3, 16),
        "angles": ("batch", "tokens", 8),
    }
    run = compiled(function, {"x": torch.randn(2, 5, 3, 16), "angles": torch.rand(2, 5, 8)}, dims, tmp_path)
    for tokens in SIZES:
        x, angles = torch.randn(2, tokens, 3, 16), torch.rand(2, tokens, 8) * 6
        both = torch.cat((angles, angles), -1)
        wide = _wide((x.transpose(1, 2), both.cos(), both.sin()))
        expected = DIALECT["rotary"].definition(*wide)
        np.testing.assert_allclose(run(x, angles), expected.numpy(), atol=5e-6)


def test_rotary_with_unequal_halves_is_traced_as_its_definition(tmp_path: Path) -> None:
    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.ops.memcompile.rotary.default(x, cos, sin)

    shapes = {"x": (2, 3, 5, 8), "cos": (2, 5, 8), "sin": (2, 5, 8)}
    dims: dict[str, tuple[int | str, ...]] = {
        "x": ("batch", 3, "tokens", 8), "cos": ("batch", "tokens", 8), "sin": ("batch", "tokens", 8),
    }  # fmt: skip
    run = compiled(function, {n: torch.randn(s) for n, s in shapes.items()}, dims, tmp_path)
    values = (torch.randn(1, 3, 65, 8), torch.randn(1, 65, 8), torch.randn(1, 65, 8))
    np.testing.assert_allclose(run(*values), DIALECT["rotary"].definition(*_wide(values)).numpy(), atol=5e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(activation: str, transposed: bool, tmp_path: Path) -> None:
    def function(
        x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.memcompile.experts.default(x, index, weight, up, down, activation, transposed)

    up, down = torch.randn(5, 16, 8), torch.randn(5, 8, 8)
    if transposed:
        up = up.mT.contiguous()
    shapes: dict[str, tuple[int | str, ...]] = {
        "x": ("rows", 8), "index": ("rows", 2), "weight": ("rows", 2),
        "up": tuple(up.shape), "down": (5, 8, 8),
    }  # fmt: skip

    def routed(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # expert 4 is never chosen, so an empty expert is always among them
        index = torch.stack([torch.randperm(4)[:2] for _ in range(rows)])
        return torch.randn(rows, 8), index, torch.rand(rows, 2)

    x, index, weight = routed(6)
    given = {"x": x, "index": index, "weight": weight, "up": up, "down": down}
    run = compiled(function, given, shapes, tmp_path)
    for rows in SIZES:
        values = (*routed(rows), up, down)
        expected = DIALECT["experts"].definition(*_wide(values), activation, transposed)
        np.testing.assert_allclose(run(*values), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_observe_keeps_the_last_queries_whatever_came_before(tmp_path: Path) -> None:
    def function(q: torch.Tensor, past: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.ops.memcompile.observe.default(q, past, positions, 6)

    dims: dict[str, tuple[int | str, ...]] = {
        "q": ("batch", 3, "tokens", 8), "past": ("batch", 3, "width", 8), "positions": ("batch", "slots"),
    }  # fmt: skip
    examples = {
        "q": torch.randn(2, 3, 5, 8), "past": torch.randn(2, 3, 7, 8),
        "positions": torch.zeros(2, 11, dtype=torch.int64),
    }  # fmt: skip
    run = compiled(function, examples, dims, tmp_path)
    for tokens in SIZES:
        for width in (0, 6):
            values = (
                torch.randn(1, 3, tokens, 8),
                torch.randn(1, 3, width, 8),
                torch.arange(tokens + 9).unsqueeze(0),
            )
            expected = DIALECT["observe"].definition(*_wide(values), 6)
            np.testing.assert_allclose(run(*values), expected.numpy(), atol=1e-6)
