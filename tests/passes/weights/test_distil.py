"""Recovery by distillation: the loss falls, zeros stay zeros, and a run that was stopped goes on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.passes.weights import distil
from memcompile.passes.weights.prune import PruneConfig
from memcompile.regions import weight_regions
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.weights.parameter import LazyParameter
from tests.models import captured_tiny, save_tiny
from tests.rewrite.tiny import entry, prompts, tiny_graph

RECOVER: dict[str, Any] = {"recover": "distil", "recover_steps": 12, "recover_learning_rate": 2e-3}
CUTS: dict[str, dict[str, Any]] = {
    "weights": {"sparsity": 0.5},
    "n_of_m": {"granularity": "n_of_m"},
    "blocks": {"granularity": "blocks", "block_size": 4, "sparsity": 0.3},
    "channels": {"granularity": "channels", "sparsity": 0.5},
    "heads": {"granularity": "heads", "sparsity": 0.5, "criterion": "activation"},
    "layers": {
        "granularity": "layers",
        "sparsity": 0.5,
        "criterion": "activation",
        "recover_parameters": "all",
    },
}


def text(folder: Path) -> CalibrationData:
    """Windows of four different tokens: what is learned of some holds for the others."""
    tokens = [3 + token % 4 for token in prompts(32 * 16)[0]]
    return CalibrationData(token_windows(tokens, 32), cache=folder)


def llama() -> fx.GraphModule:
    """A tiny model with larger weights, which prefers some tokens to others."""
    graph = captured_tiny("llama").graph
    for region in weight_regions(graph):
        if region.kind != "embedding":
            owner, _, last = str(region.weight.target).rpartition(".")
            weight = getattr(graph.get_submodule(owner), last).detach()
            larger = weight * (3 if region.kind == "linear" else 8)
            setattr(graph.get_submodule(owner), last, torch.nn.Parameter(larger))
    return graph


def recovered(graph: fx.GraphModule, folder: Path, **config: Any) -> RewriteResult:
    return apply(graph, [entry("weights.prune", **{**RECOVER, **config})], calibration=text(folder))


def told(result: RewriteResult) -> tuple[float, float]:
    """The divergence before and after, as the decision says."""
    (said,) = [decision.text for decision in result.decisions if decision.region == "model"]
    found = re.search(r"was (\S+) nats a token, and is (\S+?)(;|$)", said)
    assert found is not None
    return float(found[1]), float(found[2])


def tensors(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {
        str(n.target): distil._read(graph, str(n.target)).detach().clone()
        for n in graph.graph.nodes
        if n.op == "get_attr" and isinstance(n.meta.get("val"), torch.Tensor)
    }


@pytest.mark.parametrize("cut", CUTS)
def test_the_divergence_on_text_that_was_kept_back_falls(cut: str, tmp_path: Path) -> None:
    graph = llama()
    before, after = told(recovered(graph, tmp_path, **CUTS[cut]))
    assert 0 < after < 0.7 * before


@pytest.mark.parametrize("cut", ["weights", "n_of_m", "blocks"])
def test_zeros_stay_zeros_and_the_rest_is_trained(cut: str, tmp_path: Path) -> None:
    plain, trained = llama(), llama()
    apply(plain, [entry("weights.prune", **CUTS[cut])])
    recovered(trained, tmp_path, **CUTS[cut], recover_parameters="all")
    pairs = zip(weight_regions(plain), weight_regions(trained), strict=True)
    for one, other in ((a, b) for a, b in pairs if a.kind == "linear"):
        assert one.stored is not None
        assert other.stored is not None
        assert bool((other.stored[one.stored == 0] == 0).all())
        assert not torch.equal(one.stored, other.stored)


@pytest.mark.parametrize(
    ("parameters", "trained"), [("norms", {"layernorm", "norm"}), ("pruned", {"down_proj", "q_proj"})]
)
def test_only_what_is_asked_for_is_trained(parameters: str, trained: set[str], tmp_path: Path) -> None:
    graph = llama()
    recovered(graph, tmp_path, recover_parameters=parameters)
    changed = {name for name in tensors(graph) if name.endswith("_trained")}
    assert all(any(part in name for name in changed) for part in trained)
    assert any("norm" in name for name in changed) == (parameters == "norms")
    assert any("proj" in name for name in changed) == (parameters == "pruned")


def test_the_same_data_gives_the_same_weights_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "CHECKPOINT_STEPS", 4)
    found = []
    for folder in ("one", "two"):
        graph = llama()
        recovered(graph, tmp_path / folder)
        found.append(tensors(graph))
    taken = Stopping(monkeypatch, after=6)
    with pytest.raises(KeyboardInterrupt):
        recovered(llama(), tmp_path / "three")
    taken.after = None
    graph = llama()
    recovered(graph, tmp_path / "three")
    assert taken.steps == 6 + 8
    found.append(tensors(graph))
    # a finished one is not repeated
    recovered(llama(), tmp_path / "three")
    assert taken.steps == 6 + 8
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


def test_what_was_trained_is_remembered_for_these_zeros_only(tmp_path: Path) -> None:
    data = replace(text(tmp_path), model_digest="the same model")
    zeros = []
    for sparsity in (0.5, 0.3):
        graph = llama()
        apply(graph, [entry("weights.prune", **RECOVER, sparsity=sparsity)], calibration=data)
        (product,) = (region for region in weight_regions(graph) if region.region.endswith("0.mlp.up_proj"))
        assert product.stored is not None
        zeros.append(float((product.stored == 0).float().mean()))
    assert zeros == pytest.approx([0.5, 0.3], abs=0.01)


class Stopping:
    """Counts an optimiser's steps, and stops the process after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None) -> None:
        self.steps, self.after = 0, after
        step = torch.optim.AdamW.step

        def counted(optimizer: torch.optim.AdamW) -> None:
            if self.steps == self.after:
                raise KeyboardInterrupt
            self.steps += 1
            step(optimizer)

        monkeypatch.setattr(torch.optim.AdamW, "step", counted)


def test_a_training_that_does_not_help_leaves_the_weights(tmp_path: Path) -> None:
    plain, graph = llama(), llama()
    apply(plain, [entry("weights.prune", sparsity=0.1)])
    result = recovered(graph, tmp_path, sparsity=0.1, recover_learning_rate=1.0)
    before, after = told(result)
    assert after >= before
    assert result.decisions[-1].text.endswith("the weights stay as they were")
    wanted = tensors(plain)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(graph).items())


def test_a_second_entry_is_trained_to_the_model_before_the_first(tmp_path: Path) -> None:
    graph = llama()
    entries = [
        entry("weights.prune", granularity="channels", sparsity=0.5),
        entry("weights.prune", **{**RECOVER, **CUTS["heads"]}),
    ]
    result = apply(graph, entries, calibration=text(tmp_path))
    alone = recovered(llama(), tmp_path, **CUTS["heads"])
    assert told(result)[0] > told(alone)[0]


def test_weights_on_disk_are_trained_beside_those_that_stay_there(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    disk, memory = capture(str(folder)).graph, captured_tiny("llama").graph
    results = [told(recovered(graph, tmp_path / "cache", **CUTS["heads"])) for graph in (disk, memory)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    for region in weight_regions(disk):
        trained = region.weight.target.endswith("_trained")
        assert trained == ("self_attn" in region.region)
        assert isinstance(region.stored, LazyParameter) != trained


def test_products_with_biases_and_transposed_weights_are_trained(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    graph = capture(str(folder)).graph
    before, after = told(recovered(graph, tmp_path, recover_parameters="norms"))
    assert after < before


def quantized(graph: fx.GraphModule, folder: Path, **config: Any) -> RewriteResult:
    codes = {"bits": 4, "block_size": 16, "method": "gptq", "zero_point": "integer", **config}
    return apply(graph, [entry("weights.quantize", **codes)], calibration=text(folder))


@pytest.mark.parametrize(
    "config", [{}, {"method": "kmeans", "zero_point": "none", "spread_errors": True}, {"method": "rtn"}]
)
def test_scales_of_codes_are_trained_and_nothing_else(config: dict[str, Any], tmp_path: Path) -> None:
    plain, trained = llama(), llama()
    quantized(plain, tmp_path, **config)
    before, after = told(quantized(trained, tmp_path, **config, recover="distil", recover_steps=12))
    assert 0 < after < 0.9 * before
    untrained, found = tensors(plain), tensors(trained)
    changed = {name for name in found if name.endswith("_trained")}
    assert len(changed) == 14
    assert all("proj_scales" in name for name in changed)
    assert found.keys() - changed < untrained.keys()
    assert all(torch.equal(found[name], untrained[name]) for name in found.keys() - changed)


def test_training_of_scales_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "CHECKPOINT_STEPS", 2)
    config: dict[str, Any] = {"recover": "distil", "recover_steps": 4}
    whole, resumed = llama(), llama()
    quantized(whole, tmp_path / "whole", **config)
    taken = Stopping(monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        quantized(llama(), tmp_path / "stopped", **config)
    taken.after = None
    quantized(resumed, tmp_path / "stopped", **config)
    assert taken.steps == 3 + 2
    wanted = tensors(whole)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(resumed).items())


def test_refuses_without_a_calibration_text() -> None:
    with pytest.raises(MemcompileError, match=r"MC107 data\.calibration: weights\.prune needs it"):
        apply(llama(), [entry("weights.prune", **RECOVER)])


def test_refuses_a_model_without_logits(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC116 recovery compares a model's logits"):
        recovered(captured_tiny("bert").graph, tmp_path)


def test_refuses_parameters_that_the_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match=r"MC305 .*recover trains norms: there are none"):
        recovered(tiny_graph(), tmp_path, recover_parameters="norms")


def test_refuses_to_train_what_went(tmp_path: Path) -> None:
    config = {**RECOVER, **CUTS["layers"], "recover_parameters": "pruned"}
    with pytest.raises(ValidationError, match="of a layer that went nothing is left to train"):
        PruneConfig(**config)
