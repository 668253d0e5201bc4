"""What the backend refuses before it writes anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memcompile.backends.tvm import build
from memcompile.errors import MemcompileError
from memcompile.lowering import get_backend
from memcompile.program import build_program
from tests.models import captured_tiny


def _lower(folder: Path, device: str = "cpu") -> None:
    program = build_program(captured_tiny("llama"))
    get_backend("tvm").lower(program, folder, device=device, progress=lambda _: None)


def test_an_unknown_device_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match=r"MC112 unknown device 'tpu' for tvm"):
        _lower(tmp_path, "tpu")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "memcompile.backends.tvm.build")
    monkeypatch.delattr(sys.modules["memcompile.backends.tvm"], "build")
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(MemcompileError, match="MC115 the tvm backend needs a package that is not installed"):
        _lower(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_linker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(MemcompileError, match="MC115 there is no C\\+\\+ compiler"):
        _lower(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_attention_with_a_mask_of_its_own_is_refused(tmp_path: Path) -> None:
    import torch
    from torch import fx

    from memcompile.backends.tvm.trace import trace
    from memcompile.backends.tvm.weights import weights_of

    graph = fx.Graph()
    q, past, positions, mask = (graph.placeholder(n) for n in ("q", "past", "positions", "mask"))
    out = graph.call_function(
        torch.ops.memcompile.attention.default,
        (q, q, q),
        {"past_k": past, "past_v": past, "positions": positions, "mask": mask, "scale": 1.0, "region": "3"},
    )
    graph.output((out,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    from memcompile.artifact import TensorEntry

    entries = [
        TensorEntry("q", "float32", (1, 2, 3, 4)),
        TensorEntry("past", "float32", (1, 2, 9, 4)),
        TensorEntry("positions", "int64", (1, 8)),
        TensorEntry("mask", "float32", (1, 1, 3, 8)),
    ]
    with pytest.raises(
        MemcompileError, match="MC203 attention 3 has a mask, which the tvm backend cannot run"
    ):
        trace(module, entries, {}, weights_of(module))
