"""What the backend refuses before it writes anything, and how backends are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from memcompile.errors import MemcompileError
from memcompile.lowering import BACKENDS, get_backend
from memcompile.program import build_program
from tests.models import captured_tiny


def test_every_registered_backend_loads_and_knows_its_name() -> None:
    assert {name: get_backend(name).name for name in BACKENDS} == {name: name for name in BACKENDS}


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(MemcompileError, match=r"MC112 unknown backend 'onnx'; known: onnxruntime, torch"):
        get_backend("onnx")


def test_an_unknown_device_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    program = build_program(captured_tiny("llama"))
    with pytest.raises(MemcompileError, match=r"MC112 unknown device 'tpu' for onnxruntime"):
        get_backend("onnxruntime").lower(program, tmp_path, device="tpu", progress=lambda _: None)
    assert list(tmp_path.iterdir()) == []
