"""Artifacts of the TVM backend: what is refused when they are opened, and how their weights are mapped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memcompile.backends.tvm.weights import Weight, write_weights
from memcompile.errors import MemcompileError
from memcompile.runtime import load
from memcompile.runtime.tvm_weights import open_weights
from tests.backends.tvm.conftest import Plain
from tests.models import captured_tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture
def made(plain: Plain) -> Path:
    """An artifact that others use too: it is not written to."""
    return plain("llama")[1].artifact.path


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_a_changed_library_is_refused_before_it_is_loaded(copied: Path) -> None:
    data = bytearray((copied / "model.so").read_bytes())
    data[-1] ^= 1
    (copied / "model.so").write_bytes(data)
    with pytest.raises(MemcompileError, match=r"MC503 model\.so: sha256 is"):
        load(copied)


def test_a_library_that_is_none_is_refused(copied: Path) -> None:
    (copied / "model.so").write_bytes(b"x" * (copied / "model.so").stat().st_size)
    with pytest.raises(MemcompileError, match=r"MC505 TVM's runtime does not load model\.so"):
        load(copied, check_digests=False)


def test_a_truncated_weights_file_is_refused(copied: Path) -> None:
    path = copied / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MemcompileError, match=r"MC506 weights\.safetensors has"):
        load(copied)
    # and by what reads it, should the manifest agree with the file
    with pytest.raises(MemcompileError, match=r"MC505 weights\.safetensors is not a weights file"):
        open_weights(path)


def test_a_function_with_other_inputs_than_listed_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))
    manifest["functions"]["step"]["inputs"].append({"name": "more", "dtype": "int64", "dims": []})
    (copied / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(
        MemcompileError, match=r"MC505 step takes \d+ inputs, the manifest and the weights give"
    ):
        load(copied)


def test_a_provider_it_cannot_run_on_is_refused(made: Path) -> None:
    with pytest.raises(MemcompileError, match="MC511 provider 'cuda' is not available: TVM artifacts"):
        load(made, provider="cuda")


def test_tokens_that_the_model_does_not_have_are_refused(made: Path) -> None:
    session = load(made, threads=1)
    for token in (-1, 128):
        state = session.new_state(1, 3, 2)
        session.prefill(state, [[5, 6, 7]])
        with pytest.raises(MemcompileError, match=r"MC120 there are token ids outside 0\.\.127"):
            session.decode(state, np.array([token]))


def test_a_missing_runtime_is_named(made: Path) -> None:
    code = f"""
import sys
sys.modules["tvm_ffi"] = None
from memcompile.runtime import load
try:
    load({str(made)!r})
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("MC510 a package that running the artifact needs is not installed: ")
    assert "fix:   pip install apache-tvm apache-tvm-ffi numpy tokenizers" in done.stdout


def test_an_artifact_made_again_under_its_name_is_the_new_one(plain: Plain, tmp_path: Path) -> None:
    prompt = [5, 6, 7]

    def logits(family: str) -> np.ndarray:
        shutil.copytree(plain(family)[1].artifact.path, tmp_path / "out")
        session = load(tmp_path / "out", threads=1)
        (result,) = session.prefill(session.new_state(1, 3, 0), [prompt])
        return result

    first = logits("llama")
    shutil.rmtree(tmp_path / "out")
    assert np.abs(logits("gpt2") - first).max() > 1e-3


def test_weights_are_mapped_aligned_and_whole(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.int64),
        "half": torch.randn(5, 7).to(torch.bfloat16),
        "large": torch.randn(16, 16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "transposed": torch.randn(8, 16).t(),
    }
    path = tmp_path / "weights.safetensors"
    write_weights(path, {n: Weight.of(t) for n, t in tensors.items()}, {"step": ["large", "odd"]})
    weights = open_weights(path)
    assert [w.shape for w in weights.of("step")] == [(16, 16), (3,)]
    assert weights.of("other") == []
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        np.testing.assert_array_equal(weights.tensors[name], expected.numpy())
        assert weights.tensors[name].ctypes.data % 64 == 0


def test_the_weights_file_is_a_safetensors_file(made: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(made / "weights.safetensors")
    parameters = dict(captured_tiny("llama").graph.named_parameters())
    name = next(iter(parameters))
    np.testing.assert_array_equal(tensors[name], parameters[name].detach().numpy())
