"""`weights.quantize` with mixed bits: sensitivities are true, remembered, and obeyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.passes.weights import sensitivity
from memcompile.passes.weights.quantize import WeightsConfig
from memcompile.passes.weights.sensitivity import measure_sensitivity
from memcompile.progress import SILENT
from memcompile.regions import WeightRegion, weight_regions
from memcompile.rewrite.manager import RewriteResult, apply
from tests.models import captured_tiny
from tests.rewrite.tiny import calibration, entry, prompts, run, tiny_graph


def mixed(graph: fx.GraphModule, folder: Path, **values: Any) -> RewriteResult:
    given = {"bits": "mixed", "zero_point": "integer", **values}
    data = calibration(folder, tokens=512, window=64)
    return apply(graph, [entry("weights.quantize", **given)], calibration=data)


def divergence(one: fx.GraphModule, other: fx.GraphModule) -> float:
    rows = prompts(*[64] * 8)
    p, q = (torch.cat(run(graph, rows)).double().log_softmax(-1) for graph in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def perturbed(region: WeightRegion) -> torch.Tensor:
    weight = region.stored
    assert weight is not None
    generator = torch.Generator().manual_seed(len(region.region) + region.rows)
    return weight + 0.02 * torch.randn(weight.shape, generator=generator)


def test_a_predicted_loss_is_about_the_divergence_that_is_measured(tmp_path: Path) -> None:
    graph = tiny_graph(head_dim=16)
    regions = weight_regions(graph)
    data = calibration(tmp_path, tokens=512, window=64)
    _, losses = measure_sensitivity(graph, regions, {"noise": perturbed}, (), data, SILENT)
    for region in regions:
        changed = tiny_graph(head_dim=16)
        owner, _, last = str(region.weight.target).rpartition(".")
        setattr(changed.get_submodule(owner), last, torch.nn.Parameter(perturbed(region)))
        measured = divergence(graph, changed)
        assert 0.4 * measured < float(losses[region.region]) < 2.5 * measured, region.region


def test_a_budget_of_average_bits_is_met_and_used(tmp_path: Path) -> None:
    graph = tiny_graph()
    result = mixed(graph, tmp_path, average_bits=6.0)
    regions = weight_regions(graph)
    weights = sum(region.rows * region.width for region in regions)
    average = sum(region.bits * region.rows * region.width for region in regions) / weights
    assert 5.3 < average <= 6.0
    assert {region.bits for region in regions} == {4, 8}
    decided = {d.region: d.text for d in result.decisions}
    assert set(decided) == {region.region for region in regions}
    assert decided["head"].startswith(("4 bits; predicted to lose", "8 bits; predicted to lose"))


def test_chosen_bits_lose_less_than_the_opposite_choice(tmp_path: Path) -> None:
    graph = tiny_graph()
    mixed(graph, tmp_path, average_bits=6.0, activations="float")
    bits = {region.region: region.bits for region in weight_regions(graph)}
    opposite = tiny_graph()
    apply(
        opposite,
        [
            entry("weights.quantize", bits=12 - given, zero_point="integer", activations="float",
                  modules=[name for name, one in bits.items() if one == given])
            for given in (4, 8)
        ],
    )  # fmt: skip
    assert divergence(tiny_graph(), graph) < divergence(tiny_graph(), opposite)


def test_a_budget_of_loss_is_about_kept(tmp_path: Path) -> None:
    graph = tiny_graph()
    mixed(graph, tmp_path, max_loss=1e-4, activations="float")
    assert {region.bits for region in weight_regions(graph)} == {4, 8}
    assert divergence(tiny_graph(), graph) < 3e-4


def test_another_budget_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed(tiny_graph(), tmp_path, average_bits=6.0)
    monkeypatch.setattr(sensitivity, "_measure", None)
    graph = tiny_graph()
    mixed(graph, tmp_path, average_bits=4.0)
    assert {region.bits for region in weight_regions(graph)} == {4}


def test_a_tied_table_and_head_get_the_same_bits(tmp_path: Path) -> None:
    from memcompile.calibrate.collect import CalibrationData, token_windows

    graph = captured_tiny("llama", tie_word_embeddings=True).graph
    data = CalibrationData(token_windows(prompts(128)[0], 32), cache=tmp_path)
    apply(graph, [entry("weights.quantize", bits="mixed", max_bytes=30_000)], calibration=data)
    bits = {region.region: region.bits for region in weight_regions(graph)}
    assert bits["model.embed_tokens"] == bits["lm_head"]


def test_mixed_bits_go_with_methods_that_read_data(tmp_path: Path) -> None:
    graph = tiny_graph()
    mixed(graph, tmp_path, average_bits=5.0, method="gptq", scale_inputs="mean")
    assert {region.bits for region in weight_regions(graph)} == {4, 8}
    assert divergence(tiny_graph(), graph) < 0.01


def test_mixed_bits_beside_a_table_quantised_before(tmp_path: Path) -> None:
    graph = tiny_graph()
    apply(
        graph,
        [
            entry("weights.quantize", bits=8, modules=["embedding", "head"]),
            entry("weights.quantize", bits="mixed", average_bits=6.0, layers="all"),
        ],
        calibration=calibration(tmp_path, tokens=512, window=64),
    )
    bits = {region.region: region.bits for region in weight_regions(graph)}
    assert bits.pop("embedding") == bits.pop("head") == 8
    assert set(bits.values()) == {4, 8}


def test_a_model_without_logits_is_an_error(tmp_path: Path) -> None:
    graph = captured_tiny("bert").graph
    for region in weight_regions(graph):
        assert region.kind != "head"
    with pytest.raises(MemcompileError, match=r"MC116 the change of a model's logits was asked for"):
        mixed(graph, tmp_path, average_bits=5.0)


@pytest.mark.parametrize(
    "values",
    [{"bits": "mixed"}, {"average_bits": 5.0}, {"bits": "mixed", "average_bits": 5.0, "max_loss": 1.0}],
)
def test_a_budget_and_mixed_bits_belong_together(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="mixed takes one of average_bits, max_bytes and max_loss"):
        WeightsConfig(**values)
