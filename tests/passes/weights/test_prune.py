"""`weights.prune`: what goes, what stays, and that channels and layers leave the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile import pipeline
from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.errors import MemcompileError
from memcompile.frontend import Captured
from memcompile.passes.weights.prune import PruneConfig
from memcompile.plan import Plan, load_plan
from memcompile.program import copy_graph
from memcompile.regions import attention_regions, weight_regions
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.runtime import load
from tests.models import captured_tiny
from tests.passes.weights.test_scaled import with_outliers
from tests.rewrite.tiny import calibration, entry, prompts, tiny_graph


def pruned(graph: fx.GraphModule, folder: Path, **config: Any) -> RewriteResult:
    return apply(
        graph, [entry("weights.prune", **config)], calibration=calibration(folder, tokens=512, window=64)
    )


def llama() -> fx.GraphModule:
    return captured_tiny("llama").graph


def text(folder: Path, count: int = 8) -> CalibrationData:
    return CalibrationData(token_windows(prompts(32 * count)[0], 32), cache=folder)


def logits(graph: fx.GraphModule) -> torch.Tensor:
    ids = torch.tensor(prompts(40)[0])[None]
    with torch.no_grad():
        return next(v for v in graph(ids, torch.arange(40)[None]) if isinstance(v, torch.Tensor))


def change(graph: fx.GraphModule) -> float:
    return float((logits(graph) - logits(llama())).pow(2).mean())


def stored(graph: fx.GraphModule) -> int:
    """Numbers that the graph's products store."""
    return sum(region.rows * region.width for region in weight_regions(graph))


def zeros(graph: fx.GraphModule) -> dict[str, float]:
    found = {}
    for region in weight_regions(graph):
        if region.kind != "embedding":
            assert region.stored is not None
            found[region.region] = float((region.stored == 0).float().mean())
    return found


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor"])
def test_half_of_the_weights_become_zero(criterion: str, tmp_path: Path) -> None:
    graph = tiny_graph()
    pruned(graph, tmp_path, sparsity=0.5, criterion=criterion)
    found = zeros(graph)
    assert found.pop("head") == 0
    assert all(share == pytest.approx(0.5, abs=0.01) for share in found.values())


def test_inputs_that_count_keep_their_small_weights(tmp_path: Path) -> None:
    errors = {}
    for criterion in ("magnitude", "activation", "taylor"):
        graph = with_outliers(llama())
        want = logits(graph)
        apply(
            graph,
            [entry("weights.prune", sparsity=0.4, criterion=criterion)],
            calibration=text(tmp_path / criterion),
        )
        errors[criterion] = float((logits(graph) - want).pow(2).mean())
    assert errors["activation"] < 0.5 * errors["magnitude"]
    assert errors["taylor"] < 0.7 * errors["magnitude"]


def test_two_of_four_stay(tmp_path: Path) -> None:
    graph = tiny_graph()
    pruned(graph, tmp_path, granularity="n_of_m", lm_head=True)
    for region in weight_regions(graph):
        if region.kind != "embedding":
            assert region.stored is not None
            groups = (region.stored != 0).reshape(region.rows, -1, 4)
            assert (groups.sum(-1) == 2).all()


def test_the_knee_is_found_and_told(tmp_path: Path) -> None:
    graph = tiny_graph()
    result = pruned(graph, tmp_path, knee=True)
    texts = {decision.text for decision in result.decisions}
    (said,) = texts
    sparsity = float(said.removeprefix("sparsity ").removesuffix(": the knee"))
    assert 0.1 < sparsity < 0.9
    assert zeros(graph)["layers.1.q_proj"] == pytest.approx(sparsity, abs=0.01)


def test_channels_leave_the_model(tmp_path: Path) -> None:
    graph = llama()
    before = stored(graph)
    result = apply(graph, [entry("weights.prune", granularity="channels", sparsity=0.5)])
    assert result.outcomes[0].rewritten == ("model.layers.0.mlp.channels", "model.layers.1.mlp.channels")
    widths = {
        r.region.rpartition(".")[2]: (r.rows, r.width) for r in weight_regions(graph) if ".mlp" in r.region
    }
    full = {
        r.region.rpartition(".")[2]: (r.rows, r.width) for r in weight_regions(llama()) if ".mlp" in r.region
    }
    kept = full["down_proj"][1] // 2
    assert widths["gate_proj"] == widths["up_proj"] == (kept, full["gate_proj"][1])
    assert widths["down_proj"] == (full["down_proj"][0], kept)
    assert before - stored(graph) == 2 * 3 * kept * full["down_proj"][0]
    assert 0 < change(graph) < 1


def test_channels_that_do_nothing_are_the_ones_that_go(tmp_path: Path) -> None:
    for criterion in ("magnitude", "activation", "taylor"):
        graph = llama()
        for name, parameter in list(graph.named_parameters()):
            if name.endswith("down_proj.weight"):
                owner, _, last = name.rpartition(".")
                silent = parameter.detach().clone()
                silent[:, ::2] = 0
                setattr(graph.get_submodule(owner), last, torch.nn.Parameter(silent))
        want = logits(graph)
        apply(
            graph,
            [entry("weights.prune", granularity="channels", sparsity=0.5, criterion=criterion)],
            calibration=text(tmp_path / criterion),
        )
        torch.testing.assert_close(logits(graph), want, atol=1e-5, rtol=0)


def test_fitting_again_makes_up_for_some_of_it(tmp_path: Path) -> None:
    errors = {}
    for refit in (False, True):
        graph = llama()
        apply(
            graph,
            [
                entry(
                    "weights.prune",
                    granularity="channels",
                    sparsity=0.25,
                    criterion="activation",
                    refit=refit,
                )
            ],
            calibration=text(tmp_path, 16),
        )
        errors[refit] = change(graph)
    assert errors[True] < errors[False]


def test_channels_of_a_block_with_biases_and_reshapes() -> None:
    graph = captured_tiny("gpt2").graph
    ids, positions = torch.tensor(prompts(20)[0])[None], torch.arange(20)[None]
    before, want = stored(graph), graph(ids, positions)[0]
    apply(graph, [entry("weights.prune", granularity="channels", sparsity=0.1)])
    got = graph(ids, positions)[0]
    assert before - stored(graph) == 2 * 2 * 64 * 32
    assert 0 < float((got - want).detach().pow(2).mean()) < 0.3 * float(want.detach().pow(2).mean())


def test_one_product_for_gate_and_up_is_no_region() -> None:
    with pytest.raises(MemcompileError, match=r"MC301 weights\.prune"):
        apply(captured_tiny("phi3").graph, [entry("weights.prune", granularity="channels")])


def test_layers_that_turn_the_stream_least_leave_with_their_cache(tmp_path: Path) -> None:
    graph = llama()
    for name, parameter in list(graph.named_parameters()):
        if "layers.0" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            owner, _, last = name.rpartition(".")
            setattr(graph.get_submodule(owner), last, torch.nn.Parameter(parameter.detach() * 1e-3))
    want = logits(graph)
    config = {"granularity": "layers", "sparsity": 0.5, "criterion": "activation"}
    result = apply(graph, [entry("weights.prune", **config)], calibration=text(tmp_path))
    assert [(d.region, d.text.partition(";")[0]) for d in result.decisions] == [
        ("model.layers.0", "taken out")
    ]
    assert [region.layer for region in attention_regions(graph)] == [1]
    torch.testing.assert_close(logits(graph), want, atol=0.02, rtol=0)


def test_a_share_that_is_no_whole_layer_is_an_error(tmp_path: Path) -> None:
    config = {"granularity": "layers", "sparsity": 0.1, "criterion": "activation"}
    with pytest.raises(MemcompileError, match=r"MC305 weights\.prune: sparsity 0\.1 of 2 layers is none"):
        apply(llama(), [entry("weights.prune", **config)], calibration=text(tmp_path))


def test_pruning_comes_before_quantising(tmp_path: Path) -> None:
    graph = tiny_graph()
    apply(
        graph,
        [entry("weights.quantize", bits=4, zero_point="integer"), entry("weights.prune", sparsity=0.5)],
    )
    region = next(region for region in weight_regions(graph) if region.region == "layers.0.q_proj")
    codes, scales, zero_points = (
        getattr(graph, f"layers_0_q_proj_{name}") for name in ("codes", "scales", "zero_points")
    )
    from memcompile.dialect.quantized_weights import dequantize

    dense = dequantize(codes, scales, zero_points, None, 4, region.width, torch.float32)
    assert region.bits == 4
    assert float((dense == 0).float().mean()) >= 0.5


def test_channels_heads_and_layers_leave_the_artifact(tmp_path: Path) -> None:
    layers = {"granularity": "layers", "sparsity": 0.5, "criterion": "activation"}
    channels = {"granularity": "channels", "sparsity": 0.5}
    heads = {"granularity": "heads", "sparsity": 0.25, "criterion": "activation"}
    sizes, states, cached = {}, {}, {}
    for name, config in (("whole", None), ("channels", channels), ("heads", heads), ("layers", layers)):
        plan = load_plan(
            {
                "version": 1,
                "target": {"backend": "onnxruntime", "threads": 1},
                "workload": {"prompt_tokens": 16, "new_tokens": 4},
                "passes": [] if config is None else [{"weights.prune": config}],
            }
        )
        captured, folder = captured_tiny("llama"), tmp_path / name
        pipeline.optimize(captured, plan, folder, evaluate=False, windows=text(tmp_path).windows)
        sizes[name] = sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in (".bin", ".data"))
        session = load(folder, threads=1)
        states[name] = len(session.manifest.states)
        cached[name] = sum(state.kv_heads for state in session.manifest.states)
        (found,) = session.prefill(session.new_state(1, 16, 4), [prompts(12)[0]])
        rewritten = pipeline_graph(captured, plan, text(tmp_path))
        with torch.no_grad():
            want = rewritten(torch.tensor(prompts(12)[0])[None], torch.arange(12)[None])[0]
        np.testing.assert_allclose(found.reshape(-1), want[0, -1].numpy(), atol=1e-4)
    assert 0 < sizes["channels"] < 0.85 * sizes["whole"]
    assert 0 < sizes["layers"] < 0.85 * sizes["whole"]
    # a group of the four: 2 * 16 rows of queries, 2 * 16 of keys and values, 2 * 16 columns that read them
    assert sizes["whole"] - sizes["heads"] >= 4 * 48 * 6 * 16
    assert cached == {"whole": 4, "channels": 4, "heads": 3, "layers": 2}
    assert states["layers"] * 2 == states["whole"] == states["channels"]


def pipeline_graph(captured: Captured, plan: Plan, data: CalibrationData) -> fx.GraphModule:
    graph = copy_graph(captured.graph)
    apply(graph, plan.passes, workload=plan.workload, calibration=data)
    return graph


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"granularity": "n_of_m", "n": 4, "m": 4}, "nothing would go"),
        ({"knee": True, "criterion": "taylor"}, "knee"),
        ({"refit": True}, "refit"),
        ({"granularity": "layers"}, "its criterion is activation"),
        ({"sparsity": 1.0}, "less than or equal to 0.99"),
    ],
)
def test_refuses_a_setting(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        PruneConfig(**values)


def test_a_model_without_logits_has_no_knee(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC116 the knee is looked for in a model's logits"):
        pruned(captured_tiny("bert").graph, tmp_path, knee=True)
