"""`weights.quantize` with inputs scaled and shifted: what that costs, gains, and where the scale goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from memcompile.calibrate.collect import CalibrationData
from memcompile.regions import argument
from memcompile.rewrite.manager import apply
from tests.models import captured_tiny
from tests.rewrite.tiny import entry

RMS_NORM = torch.ops.memcompile.rms_norm.default
LAYER_NORM = torch.ops.aten.layer_norm.default
LINEAR = torch.ops.memcompile.quantized_linear.default
OUTLIERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def windows(graph: fx.GraphModule, count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 60, (1, 32), generator=generator)
        given = {"input_ids": ids, "position_ids": torch.arange(32)[None], "attention_mask": ids * 0 + 1}
        found.append(
            {str(n.target): given[str(n.target)] for n in graph.graph.nodes if n.op == "placeholder"}
        )
    return found


def logits(graph: fx.GraphModule, window: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return next(value for value in graph(*window.values()) if isinstance(value, torch.Tensor))


def with_outliers(graph: fx.GraphModule) -> fx.GraphModule:
    """The same model: some channels of norms 30 times as large, their columns of weights as much smaller."""
    for name, parameter in list(graph.named_parameters()):
        owner, _, last = name.rpartition(".")
        changed = parameter.detach().clone()
        if "layernorm" in name:
            changed[::7] *= 30
        elif owner.endswith(OUTLIERS):
            changed[:, ::7] /= 30
        setattr(graph.get_submodule(owner), last, torch.nn.Parameter(changed))
    return graph


def rewritten(graph: fx.GraphModule, folder: Path, **config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on a window of their own, before and after."""
    *given, held_out = windows(graph)
    want = logits(graph, held_out)
    values = {"bits": 8, "embedding": False, "lm_head": False, **config}
    apply(
        graph, [entry("weights.quantize", **values)], calibration=CalibrationData(tuple(given), cache=folder)
    )
    return want, logits(graph, held_out)


def error(graph: fx.GraphModule, folder: Path, **config: Any) -> float:
    want, got = rewritten(graph, folder, **config)
    return float((got - want).pow(2).mean())


@pytest.mark.parametrize("kind", ["mean", "largest"])
def test_scaled_inputs_survive_outliers(kind: str, tmp_path: Path) -> None:
    plain = error(with_outliers(captured_tiny("llama").graph), tmp_path)
    scaled = error(with_outliers(captured_tiny("llama").graph), tmp_path, scale_inputs=kind)
    assert scaled < 0.2 * plain


def test_a_scale_is_folded_into_the_norm_and_into_the_product_before() -> None:
    graph = captured_tiny("llama").graph
    before = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    given = windows(graph)
    values = {"scale_inputs": "mean", "scale_exponent": 0.5, "embedding": False, "lm_head": False}
    apply(graph, [entry("weights.quantize", **values)], calibration=CalibrationData(tuple(given)))
    after = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert after.count(RMS_NORM) == before.count(RMS_NORM)
    # only the product after attention has nothing before it to take the scale
    multiplied = after.count(torch.ops.aten.mul.Tensor) - before.count(torch.ops.aten.mul.Tensor)
    assert multiplied == 2
    norms = [node.args[1].target for node in graph.graph.nodes if node.target is RMS_NORM]
    assert sum("input_norm" in str(name) for name in norms) == 4


def test_scaling_alone_changes_nothing(tmp_path: Path) -> None:
    # eight bits and float inputs: what is left is the weights' rounding
    want, got = rewritten(
        captured_tiny("llama").graph, tmp_path, scale_inputs="mean", scale_exponent=1.0, zero_point="float",
        block_size=16, activations="float",
    )  # fmt: skip
    assert float((got - want).abs().max()) < 0.02 * float(want.abs().max())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shifted_inputs_keep_the_outputs(family: str, tmp_path: Path) -> None:
    graph = captured_tiny(family).graph
    layer_norms = [node.target for node in graph.graph.nodes].count(LAYER_NORM)
    want, got = rewritten(graph, tmp_path, shift_inputs=True, scale_inputs="largest", scale_exponent=0.5)
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())
    assert not torch.equal(got, want)
    # every product has a bias now, and a layer norm takes the shift in
    assert all(argument(n, "bias") is not None for n in graph.graph.nodes if n.target is LINEAR)
    assert [node.target for node in graph.graph.nodes].count(LAYER_NORM) == layer_norms


def test_a_shift_helps_inputs_that_stand_off_zero(tmp_path: Path) -> None:
    errors = {}
    for shift in (False, True):
        graph = captured_tiny("gpt2").graph
        for name, parameter in list(graph.named_parameters()):
            owner, _, last = name.rpartition(".")
            if ".ln_" in name and last == "bias":
                setattr(graph.get_submodule(owner), last, torch.nn.Parameter(parameter.detach() + 20))
        errors[shift] = error(graph, tmp_path, shift_inputs=shift)
    assert errors[True] < 0.1 * errors[False]


def test_a_weight_with_two_uses_is_not_scaled(tmp_path: Path) -> None:
    graph = captured_tiny("llama", tie_word_embeddings=True).graph
    want, got = rewritten(graph, tmp_path, scale_inputs="mean", lm_head=True)
    made = [name for name, _ in graph.named_buffers() if "_input_" in name]
    assert len(made) == 6
    assert not any(name.startswith("lm_head") for name in made)
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())
