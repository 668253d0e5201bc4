"""onnxruntime-genai loads a plain artifact and generates what our runtime generates, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memcompile.frontend import Captured
from memcompile.rewrite.manager import apply
from memcompile.runtime import Sampling, load
from tests.backends.onnxruntime.build import session_of
from tests.backends.onnxruntime.conftest import Plain
from tests.models import captured_tiny
from tests.rewrite.tiny import entry

genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")


def generate_with_genai(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens of onnxruntime-genai, one thread."""
    config = genai.Config(str(folder))
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    parameters = genai.GeneratorParams(genai.Model(config))
    parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
    generator = genai.Generator(genai.Model(config), parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_tiny_models_generate_the_same_tokens(family: str, plain: Plain) -> None:
    _, session = plain(family)
    generator = torch.Generator().manual_seed(4)
    prompt = [int(t) for t in torch.randint(3, 128, (37,), generator=generator)]
    ours = session.generate([prompt], max_new_tokens=24, sampling=Sampling())[0].tokens
    assert len(ours) >= 8, "the model ended too soon for the comparison to mean anything"
    assert generate_with_genai(session.artifact.path, prompt, 24)[: len(ours)] == list(ours)


def test_a_windowed_artifact_does_not_claim_to_run_in_genai(tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    apply(captured.graph, [entry("attention.static", window_tokens=8, sink_tokens=2)])
    session_of(captured, tmp_path / "out")
    assert not (tmp_path / "out" / "genai_config.json").exists()


@pytest.mark.slow
def test_smollm2_generates_the_same_tokens(smollm2: Callable[..., Captured], smollm2_artifact: Path) -> None:
    session = load(smollm2_artifact, threads=1)
    prompt = smollm2().tokenizer.encode("It is a truth universally acknowledged, that a single man")
    ours = session.generate([prompt], max_new_tokens=32, sampling=Sampling())[0].tokens
    assert generate_with_genai(smollm2_artifact, list(prompt), 32)[: len(ours)] == list(ours)
