"""The Python API, as README shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memcompile
from memcompile.errors import MemcompileError
from tests.models import example_inputs, tiny_model, tiny_tokenizer

EVICT = {
    "version": 1,
    "workload": {"prompt_tokens": 64, "new_tokens": 8},
    "passes": [{"kv.evict": {"preset": "snapkv", "keep_tokens": 40}}, {"kv.quantize": {"bits": 8}}],
}
DENSE: dict[str, Any] = {"version": 1}


def calibration() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (2, 1, 64), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "position_ids": torch.arange(64).unsqueeze(0)} for row in ids]


@pytest.fixture(scope="module")
def evicting() -> memcompile.CompiledModel:
    model = tiny_model("llama")
    return memcompile.optimize(model, EVICT, tokenizer=tiny_tokenizer(), calibration=calibration())


def test_a_compiled_model_is_called_like_the_original() -> None:
    model = tiny_model("llama")
    compiled = memcompile.optimize(model, DENSE)
    inputs = example_inputs("llama")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def test_gradients_reach_the_models_parameters(evicting: memcompile.CompiledModel) -> None:
    evicting.zero_grad()
    evicting(**example_inputs("llama")).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in evicting.parameters())


def test_generate_equals_greedy_decoding_of_the_original() -> None:
    model = tiny_model("llama", eos_token_id=None)
    (row,) = example_inputs("llama", batch=1, tokens=9)["input_ids"].tolist()
    (generation,) = memcompile.optimize(model, DENSE).generate([row], max_new_tokens=6)
    want = list(row)
    for _ in range(6):
        with torch.no_grad():
            want.append(int(model(input_ids=torch.tensor([want])).logits[0, -1].argmax()))
    assert list(generation.tokens) == want[len(row) :]


def test_the_report_names_what_each_pass_did(evicting: memcompile.CompiledModel) -> None:
    passes = {outcome["pass"]: outcome for outcome in evicting.report["passes"]}
    assert passes["kv.evict"]["rewritten"] == ["0", "1"]
    assert passes["kv.quantize"]["refusals"] == []


def test_an_exported_artifact_generates_what_the_compiled_model_does(
    evicting: memcompile.CompiledModel, tmp_path: Path
) -> None:
    rows = example_inputs("llama", batch=2, tokens=60)["input_ids"].tolist()
    rows[1] = rows[1][:47]
    artifact = evicting.export(tmp_path / "artifact", "onnxruntime")
    session = memcompile.load(artifact)
    states = [s.new_state(2, 60, 8) for s in (session, evicting._session)]  # type: ignore[union-attr]
    for own, state in zip((session, evicting._session), states, strict=True):
        own.prefill(state, rows)  # type: ignore[union-attr]
        own.compress(state)  # type: ignore[union-attr]
    for token in ([5, 6], [7, 8], [9, 10]):
        want = evicting._session.decode(states[1], np.array(token))  # type: ignore[union-attr]
        np.testing.assert_allclose(session.decode(states[0], np.array(token)), want, atol=2e-5, rtol=0)
    assert states[0].nbytes <= 2 * 2 * (40 + 8) * 2 * 2 * 16 + 2 * 2 * 4 * 32 * 16 * 4


def test_any_module_is_rewritten_through_its_example_inputs() -> None:
    module = tiny_model("transformer_encoder")
    inputs = example_inputs("transformer_encoder")
    compiled = memcompile.optimize(module, DENSE, inputs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), module(**inputs), atol=1e-5, rtol=0)
    with pytest.raises(MemcompileError, match=r"MC120.*cannot generate"):
        compiled.generate([[1, 2]])


def test_the_torch_backend_has_no_artifact(evicting: memcompile.CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC112"):
        evicting.export(tmp_path / "artifact", "torch")
    assert not (tmp_path / "artifact").exists()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        memcompile.optimise  # type: ignore[attr-defined]  # noqa: B018
