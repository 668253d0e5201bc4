"""A model in a folder is captured, rewritten and written without its weights in memory: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile import pipeline
from memcompile.api import optimize
from memcompile.frontend import capture, load_source
from memcompile.plan import load_plan
from memcompile.weights.lazy import Stored
from memcompile.weights.parameter import LazyParameter
from tests.models import captured_tiny, tiny_model


def _saved(tmp_path: Path, family: str) -> str:
    folder = tmp_path / family
    model: Any = tiny_model(family)
    model.save_pretrained(folder)
    return str(folder)


def test_loading_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _saved(tmp_path, "mixtral")
    read: list[Stored] = []
    monkeypatch.setattr(Stored, "read", lambda self, *_: read.append(self))
    module = load_source(source, lazy=True).module
    assert not read
    assert all(isinstance(parameter, LazyParameter) for parameter in module.parameters())


# experts that transformers joins from several tensors, a stored transpose, tied embeddings
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3"])
def test_the_capture_is_that_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    wanted, got = captured_tiny(family), capture(_saved(tmp_path, family))
    assert str(got.graph.graph) == str(wanted.graph.graph)
    assert got.model == wanted.model
    # a tied weight has two names, and the shared capture keeps the one that its graph reads
    parameters = dict(got.graph.named_parameters(remove_duplicate=False))
    floats = dict(wanted.graph.named_parameters(remove_duplicate=False))
    assert floats.keys() <= parameters.keys()
    for name, value in floats.items():
        lazy = parameters[name]
        assert isinstance(lazy, LazyParameter)
        assert torch.equal(lazy.expression.evaluate(), value)


@pytest.mark.parametrize(
    "passes", [[], [{"weights.quantize": {"preset": "int4_hqq"}}]], ids=["dense", "quantised"]
)
def test_the_artifact_is_that_of_the_loaded_model(
    tmp_path: Path, passes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(
        {
            "version": 1, "model": {"source": "model"}, "target": {"backend": "onnxruntime"},
            "workload": {"prompt_tokens": 16, "new_tokens": 4}, "passes": passes,
        }
    )  # fmt: skip
    pipeline.optimize(captured_tiny("llama"), plan, tmp_path / "wanted", evaluate=False)
    captured = capture(_saved(tmp_path, "llama"))
    read: list[Stored] = []
    original = Stored.read

    def reading(self: Stored, begin: int, end: int) -> torch.Tensor:
        read.append(self)
        return original(self, begin, end)

    monkeypatch.setattr(Stored, "read", reading)
    compiled = pipeline.rewrite_captured(captured, plan)
    assert not read, "no weight is read before the artifact is written"
    pipeline.export(captured, compiled, plan, tmp_path / "got")
    assert read
    for name in ("weights.bin", "model.onnx", "model.kernels.onnx", "genai.onnx"):
        wanted = tmp_path / "wanted" / name
        assert not wanted.exists() or (tmp_path / "got" / name).read_bytes() == wanted.read_bytes()


def test_a_live_module_is_materialised(tmp_path: Path) -> None:
    plan = {"version": 1, "model": {"source": "model"}, "passes": []}
    compiled = optimize(_saved(tmp_path, "llama"), plan)
    assert not any(isinstance(parameter, LazyParameter) for parameter in compiled.parameters())
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        wanted = tiny_model("llama")(ids).logits
        torch.testing.assert_close(compiled(ids).logits, wanted, rtol=1e-4, atol=1e-4)
