"""The example of the Python API runs, on a tiny model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_the_example_runs_from_capture_to_artifact(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("python_api", ROOT / "examples" / "python_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.main(tiny_folder("llama"), tmp_path / "artifact")
    printed = capsys.readouterr().out
    assert "parameters with a gradient" in printed
    # greedy decoding of the same model: both backends say the same
    assert f"onnxruntime: {text}" in printed
    assert (tmp_path / "artifact" / "manifest.json").exists()
