"""`weights.quantize` on mixtures: experts become codes, in torch and in ONNX Runtime alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import fx

from memcompile import pipeline
from memcompile.plan import load_plan
from memcompile.rewrite.manager import apply
from memcompile.rewrite.verify import verify
from memcompile.runtime import load
from tests.models import captured_tiny
from tests.rewrite.tiny import entry, prompts

QUANTIZED = torch.ops.memcompile.quantized_experts.default
EXPERTS = torch.ops.memcompile.experts.default
ONLY = ["*.experts"]


def count(graph: fx.GraphModule, target: Any) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


def logits(graph: fx.GraphModule) -> torch.Tensor:
    ids = torch.tensor(prompts(12)[0])[None]
    with torch.no_grad():
        found: torch.Tensor = graph(ids, torch.arange(12)[None])[0]
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_become_codes(family: str) -> None:
    graph, whole = captured_tiny(family).graph, captured_tiny(family).graph
    layers = count(graph, EXPERTS)
    assert layers == 2
    result = apply(graph, [entry("weights.quantize", bits=8, modules=ONLY)])
    assert len(result.outcomes[0].rewritten) == layers
    assert (count(graph, EXPERTS), count(graph, QUANTIZED)) == (0, layers)
    verify(graph, "the test")
    want, got = logits(whole), logits(graph)
    assert 0 < float((got - want).abs().max()) < 0.05 * float(want.abs().max())
    codes = [name for name, _ in graph.named_buffers() if name.endswith("_codes")]
    assert len(codes) == 2 * layers


def test_experts_can_be_left_out() -> None:
    graph = captured_tiny("mixtral").graph
    apply(graph, [entry("weights.quantize", experts=False)])
    assert count(graph, QUANTIZED) == 0


def test_a_second_run_and_float_zero_points_are_refused() -> None:
    graph = captured_tiny("mixtral").graph
    result = apply(graph, [entry("weights.quantize", zero_point="float", modules=ONLY)], strict=False)
    assert {refusal.reason for refusal in result.refusals} == {"experts have no float zero points"}
    apply(graph, [entry("weights.quantize", modules=ONLY)])
    result = apply(graph, [entry("weights.quantize", modules=ONLY)], strict=False)
    assert {refusal.reason for refusal in result.refusals} == {"its weight is already quantised to 8 bits"}


@pytest.mark.parametrize(("bits", "activations", "tolerance"), [(4, "float", 1e-4), (8, "int8", 0.05)])
def test_the_artifact_runs_them_as_one_operator(
    bits: int, activations: str, tolerance: float, tmp_path: Path
) -> None:
    config = {"bits": bits, "zero_point": "integer", "activations": activations, "modules": ONLY}
    plan = load_plan(
        {
            "version": 1,
            "target": {"backend": "onnxruntime", "threads": 1},
            "workload": {"prompt_tokens": 16, "new_tokens": 4},
            "passes": [{"weights.quantize": {**config, "block_size": 16}}],
        }
    )
    pipeline.optimize(captured_tiny("mixtral"), plan, tmp_path / "out", evaluate=False)
    operators = [node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert operators.count("QMoE") == 2
    session = load(tmp_path / "out", threads=1)
    (found,) = session.prefill(session.new_state(1, 16, 4), [prompts(12)[0]])
    graph = captured_tiny("mixtral").graph
    apply(graph, plan.passes)
    want = logits(graph)[0, -1].numpy()
    np.testing.assert_allclose(found.reshape(-1), want, atol=tolerance * float(np.abs(want).max()))
