"""The real SmolLM2-135M, captured once, through the plans that matter."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.frontend import Captured
from memcompile.pipeline import inspect, optimize
from memcompile.plan import load_plan
from memcompile.regions import attention_regions
from memcompile.rewrite.manager import apply
from memcompile.runtime import Session, load
from memcompile.weights.parameter import remembering
from tests.conftest import ROOT
from tests.rewrite.tiny import entry

PROMPT_TOKENS, NEW_TOKENS = 600, 8
# of the dense fp32 cache: 30 layers, 3 key/value heads of 64, keys and values
DENSE_TOKEN_BYTES = 30 * 3 * 64 * 2 * 4
CALIBRATION = {"calibration": {"text": str(ROOT / "examples" / "texts" / "emma.txt.xz"), "tokens": 1024}}
PLANS: dict[str, list[dict[str, Any]]] = {
    "int8": [{"kv.quantize": {"bits": 8, "expect": 30}}],
    "evict-int8": [{"kv.evict": {"preset": "snapkv", "keep_tokens": 128}}, {"kv.quantize": {"bits": 8}}],
    "windows": [{"attention.static": {"preset": "streaming_llm", "window_tokens": 124, "sink_tokens": 4}}],
}


@pytest.fixture(scope="module")
def captured(smollm2: Callable[..., Captured]) -> Captured:
    """The model's graph."""
    return smollm2()


@pytest.fixture(scope="module")
def prompt(captured: Captured, book: str) -> list[int]:
    """The beginning of Persuasion."""
    tokens: list[int] = captured.tokenizer(book[:6000]).input_ids[:PROMPT_TOKENS]
    assert len(tokens) == PROMPT_TOKENS
    return tokens


@pytest.fixture(scope="module")
def logits(captured: Captured, prompt: list[int]) -> torch.Tensor:
    """What the captured graph says after each token of the prompt, [T,V]."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        outputs = captured.graph(tokens, torch.arange(PROMPT_TOKENS).unsqueeze(0))
    assert captured.logits_index is not None
    found: torch.Tensor = outputs[captured.logits_index][0]
    return found


def artifact(captured: Captured, name: str, folder: Path) -> Session:
    """The model compiled by one of the plans, opened."""
    plan = load_plan(
        {
            "version": 1,
            "target": {"backend": "onnxruntime", "threads": 1},
            "workload": {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS},
            "data": CALIBRATION,
            "passes": PLANS[name],
        }
    )
    optimize(captured, plan, folder / name, evaluate=False)
    return load(folder / name, threads=1)


def test_all_thirty_regions_are_found_and_proven_causal(captured: Captured) -> None:
    found = inspect(captured)
    assert found["refusals"] == []
    assert found["parameters"] == 134_515_008
    assert [
        (region["layer"], region["heads"], region["kv_heads"], region["head_dim"], region["mask"])
        for region in found["regions"]
    ] == [(layer, 9, 3, 64, "causal") for layer in range(30)]


def test_the_graph_says_what_transformers_says(
    smollm2_path: Path, prompt: list[int], logits: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_the_dense_artifact_says_what_the_graph_says(
    smollm2_artifact: Path, prompt: list[int], logits: torch.Tensor
) -> None:
    session = load(smollm2_artifact, threads=1)
    state = session.new_state(1, PROMPT_TOKENS, NEW_TOKENS)
    (found,) = session.prefill(state, [prompt], all_logits=True)
    torch.testing.assert_close(torch.from_numpy(found), logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "most_bytes", "most_kl"),
    [
        ("int8", DENSE_TOKEN_BYTES * (PROMPT_TOKENS + NEW_TOKENS) * 0.27, 0.02),
        ("evict-int8", DENSE_TOKEN_BYTES * (128 + NEW_TOKENS) * 0.30, 1.0),
        # window, sinks, and room for what is decoded before the next compaction
        ("windows", DENSE_TOKEN_BYTES * PROMPT_TOKENS * 0.5, 2.0),
    ],
)
def test_a_plan_saves_allocated_state_and_stays_near_the_original(
    name: str,
    most_bytes: float,
    most_kl: float,
    captured: Captured,
    prompt: list[int],
    logits: torch.Tensor,
    tmp_path: Path,
) -> None:
    session = artifact(captured, name, tmp_path)
    state = session.new_state(1, PROMPT_TOKENS, NEW_TOKENS)
    session.prefill(state, [prompt[:-1]])
    session.compress(state)
    found = torch.from_numpy(session.decode(state, [prompt[-1]]))[0].log_softmax(-1)
    expected = logits[-1].log_softmax(-1)
    kl = float((expected.exp() * (expected - found)).sum())
    assert 0 <= kl < most_kl
    assert state.nbytes < most_bytes


def test_heads_leave_the_model_and_a_few_steps_recover_some_of_it(
    smollm2: Callable[..., Captured], book: str, tmp_path: Path
) -> None:
    # the file's codes cannot be pruned: the floats they stand for can
    floats = smollm2(weights="float32")
    graph, tokens = floats.graph, floats.tokenizer(book[:3000]).input_ids[: 6 * 64]
    heads = {"granularity": "heads", "criterion": "activation", "sparsity": 0.1}
    recover = {"recover": "distil", "recover_steps": 6, "recover_learning_rate": 1e-3}
    data = CalibrationData(token_windows(tokens, 64), model_digest="smollm2", cache=tmp_path)
    with remembering(1 << 30):
        result = apply(graph, [entry("weights.prune", **heads, **recover)], calibration=data)
    kept = [(region.heads, region.kv_heads) for region in attention_regions(graph)]
    # 27 of 270 query heads, three with their keys and values each
    assert sum(heads for heads, _ in kept) == 270 - 27
    assert set(kept) <= {(9, 3), (6, 2), (3, 1)}
    found = re.search(r"was (\S+) nats a token, and is (\S+)$", result.decisions[-1].text)
    assert found is not None
    assert 0 < float(found[2]) < float(found[1])


def test_tables_of_four_bits_lose_less_than_rounding(
    smollm2: Callable[..., Captured], prompt: list[int], book: str
) -> None:
    found = {}
    methods: dict[str, dict[str, Any]] = {"rtn": {"zero_point": "integer"}, "kmeans": {"weigh_inputs": True}}
    for method, values in methods.items():
        captured = smollm2(weights="float32")
        # not the text that is predicted below
        text = captured.tokenizer(book[20_000:28_000]).input_ids[:1024]
        windows = token_windows(text, 512)
        config = {"bits": 4, "method": method, "activations": "float", **values}
        one = entry("weights.quantize", layers="all", **config)
        apply(captured.graph, [one], calibration=CalibrationData(windows))
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            outputs = captured.graph(tokens, torch.arange(PROMPT_TOKENS).unsqueeze(0))
        assert captured.logits_index is not None
        logits = outputs[captured.logits_index][0, :-1]
        found[method] = float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).exp())
    assert found["kmeans"] < found["rtn"]
