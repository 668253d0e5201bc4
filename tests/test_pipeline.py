"""The pipeline's promises about what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memcompile import pipeline
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.plan import load_plan
from tests.models import save_tiny, tiny_model

SECTIONS = {
    "version": 1,
    "target": {"threads": 1},
    "workload": {"prompt_tokens": 96, "new_tokens": 8},
    "passes": [{"attention.static": {"window_tokens": 16, "sink_tokens": 2}}],
}


def test_artifact_report_and_measurements_of_original_and_rewritten(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    gates = {"state_bytes": {"max": "64KiB"}}
    plan = load_plan({**SECTIONS, "gates": gates})
    result = pipeline.optimize(
        str(source), plan, tmp_path / "out", compare_with_source=False, quick=True
    ).as_dict()
    assert result["artifact"] == str(tmp_path / "out")
    for name in (
        "perplexity",
        "prefill_seconds",
        "decode_seconds_per_token",
        "peak_memory_bytes",
        "state_bytes",
    ):
        assert result["original"][name] > 0
        assert result["rewritten"][name] > 0
    assert result["rewritten"]["kl"] > 0
    assert result["rewritten"]["state_bytes"] < result["original"]["state_bytes"]
    step = result["attribution"]
    assert step["original"]["bytes"]["weights"] == step["rewritten"]["bytes"]["weights"] > 0
    assert step["original"]["bytes"]["state"] == result["original"]["state_bytes_predicted"]
    assert step["predicted_speedup"] > 1
    assert [gate["passed"] for gate in result["gates"]] == [True]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["gates"][0]["name"] == "state_bytes"
    assert manifest["step_bytes"]["weights"] == step["rewritten"]["bytes"]["weights"]
    assert {"report.json", "report.html", "model.onnx", "tokenizer.json"} <= set(manifest["files"])


def test_an_unmet_gate_leaves_no_artifact_and_says_what_was_measured(tmp_path: Path) -> None:
    plan = load_plan({**SECTIONS, "gates": {"state_bytes": {"max": 100}, "decode_speedup": {"min": 0.001}}})
    with pytest.raises(pipeline.GatesUnmet, match=r"MC401.*state_bytes") as caught:
        pipeline.optimize(capture(tiny_model("llama")), plan, tmp_path / "out", quick=True)
    assert caught.value.exit_code == 5
    assert [(g.name, g.passed) for g in caught.value.result.gates] == [
        ("state_bytes", False),
        ("decode_speedup", True),
    ]
    assert list(tmp_path.iterdir()) == []


def test_gates_cannot_be_skipped_silently(tmp_path: Path) -> None:
    plan = load_plan({**SECTIONS, "gates": {"state_bytes": {"max": "1MiB"}}})
    with pytest.raises(MemcompileError, match=r"MC120.*gates need the evaluation"):
        pipeline.optimize(capture(tiny_model("llama")), plan, tmp_path / "out", evaluate=False)


def test_a_name_that_is_taken_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(MemcompileError, match="MC508"):
        pipeline.optimize("no such model", load_plan(SECTIONS), tmp_path / "out")


def test_inspect_tells_the_regions() -> None:
    told = pipeline.inspect(capture(tiny_model("mistral")))
    assert told["schema"] == 1
    assert told["regions"][1] == {
        "kind": "attention", "layer": 1, "path": "model.layers.1.self_attn", "heads": 4, "kv_heads": 2,
        "head_dim": 16, "mask": "sliding_window", "window_tokens": 8,
    }  # fmt: skip
