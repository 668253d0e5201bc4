"""`weights.quantize`: what it rewrites, what it leaves, and what the rewritten model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.passes.weights.quantize import WeightsConfig
from memcompile.regions import weight_regions
from memcompile.rewrite.manager import RewriteResult, apply
from tests.models import captured_tiny, example_inputs
from tests.rewrite.tiny import calibration, entry, prompts, run, tiny_graph

LINEAR = torch.ops.memcompile.quantized_linear.default
EMBEDDING = torch.ops.memcompile.quantized_embedding.default


def quantized(graph: fx.GraphModule, **values: Any) -> RewriteResult:
    return apply(graph, [entry("weights.quantize", **values)])


def nodes(graph: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is target]


def test_golden_of_a_quantised_model() -> None:
    graph = tiny_graph(layers=1)
    result = quantized(graph, bits=4, zero_point="integer")
    assert result.outcomes[0].rewritten == (
        "embedding", "layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj", "layers.0.o_proj", "head",
    )  # fmt: skip
    made = [(e.action, e.node) for e in result.journal.entries if e.region == "layers.0.q_proj"]
    assert made == [
        ("stored", "layers_0_q_proj_codes"),
        ("made", "layers_0_q_proj_codes"),
        ("stored", "layers_0_q_proj_scales"),
        ("made", "layers_0_q_proj_scales"),
        ("stored", "layers_0_q_proj_zero_points"),
        ("made", "layers_0_q_proj_zero_points"),
        ("made", "quantized_linear_default"),
        ("marked", "quantized_linear_default"),
        ("marked", "quantized_linear_default"),
        ("changed", "reshape"),
        ("erased", "linear"),
        ("erased", "layers_0_q_proj_weight"),
    ]
    assert {region.bits for region in weight_regions(graph)} == {4}
    assert [region.kind for region in weight_regions(graph)] == ["embedding", *["linear"] * 4, "head"]


def test_eight_bits_stay_close_and_four_are_coarser() -> None:
    rows = prompts(5, 30)
    want = torch.cat(run(tiny_graph(), rows))
    errors = []
    for bits in (8, 4):
        graph = tiny_graph()
        quantized(graph, bits=bits)
        errors.append(float((torch.cat(run(graph, rows)) - want).abs().max()))
    # logits of about 1
    assert 0 < errors[0] < 0.03
    assert errors[0] * 4 < errors[1] < 0.6


def test_int8_activations_cost_a_little_more() -> None:
    rows = prompts(5, 30)
    want = torch.cat(run(tiny_graph(), rows))
    found = {}
    for activations in ("float", "int8"):
        graph = tiny_graph()
        quantized(graph, bits=8, activations=activations)
        found[activations] = float((torch.cat(run(graph, rows)) - want).pow(2).mean())
    assert 0 < found["float"] < found["int8"] < 1e-3


def test_a_tied_head_and_embedding_share_one_copy() -> None:
    graph = captured_tiny("llama", tie_word_embeddings=True).graph
    quantized(graph, bits=4, block_size=16)
    (table,), head = nodes(graph, EMBEDDING), nodes(graph, LINEAR)[-1]
    assert table.args[1:6] == head.args[1:6]
    assert len([name for name, _ in graph.named_buffers() if "embed" in name]) == 2


def test_untied_ones_are_stored_each() -> None:
    graph = captured_tiny("llama", tie_word_embeddings=False).graph
    quantized(graph, bits=4, block_size=16)
    (table,), head = nodes(graph, EMBEDDING), nodes(graph, LINEAR)[-1]
    assert set(table.args[1:3]).isdisjoint(head.args[1:3])


def test_head_and_embedding_can_be_left_out() -> None:
    graph = captured_tiny("llama", tie_word_embeddings=True).graph
    result = quantized(graph, lm_head=False, embedding=False)
    assert len(result.outcomes[0].rewritten) == 14
    left = [region.region for region in weight_regions(graph) if not region.bits]
    assert left == ["model.embed_tokens", "lm_head"]


def test_layers_leave_out_what_is_outside_of_them() -> None:
    result = apply(tiny_graph(), [entry("weights.quantize", layers="1-2")])
    assert len(result.outcomes[0].rewritten) == 8
    assert all(name.startswith(("layers.1.", "layers.2.")) for name in result.outcomes[0].rewritten)


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        (["layers.*"], 12),
        (["*.q_proj", "*.k_proj"], 6),
        (["!*.q_proj"], 11),
        (["layers.1", "!*.o_proj"], 3),
        (["head"], 1),
    ],
)
def test_modules_are_chosen_by_path(modules: list[str], count: int) -> None:
    assert len(quantized(tiny_graph(), modules=modules).outcomes[0].rewritten) == count


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(MemcompileError, match=r"MC301 weights\.quantize\.modules: '\*\.mlp' matches none"):
        quantized(tiny_graph(), modules=["*.mlp"])


def test_two_entries_mix_bits() -> None:
    graph = tiny_graph()
    apply(
        graph,
        [
            entry("weights.quantize", bits=8, modules=["head", "embedding"]),
            entry("weights.quantize", bits=4, layers="all"),
        ],
    )
    bits = {region.region: region.bits for region in weight_regions(graph)}
    assert bits["head"] == bits["embedding"] == 8
    assert {bits[name] for name in bits if name.startswith("layers.")} == {4}


def test_one_weight_asked_for_twice_is_an_error() -> None:
    with pytest.raises(
        MemcompileError, match=r"MC109 weights\.quantize is asked for twice in layers\.1\.q_proj"
    ):
        apply(
            tiny_graph(),
            [entry("weights.quantize", layers=1), entry("weights.quantize", modules=["*.q_proj"])],
        )


def test_refuses_what_is_already_quantised() -> None:
    graph = tiny_graph()
    quantized(graph, bits=8)
    result = apply(graph, [entry("weights.quantize", bits=4)], strict=False)
    assert {refusal.reason for refusal in result.refusals} == {"its weight is already quantised to 8 bits"}


def test_refuses_weights_computed_at_run_time() -> None:
    result = apply(tiny_graph(computed=True), [entry("weights.quantize")], strict=False)
    assert {refusal.reason for refusal in result.refusals} == {"its weight is computed at run time"}


@pytest.mark.parametrize("family", ["gpt2", "bert", "phi3", "transformer_encoder"])
def test_other_families_keep_their_outputs(family: str) -> None:
    captured = captured_tiny(family)
    inputs = [
        {**example_inputs(family), "position_ids": torch.arange(11).repeat(2, 1),
         "attention_mask": torch.ones(2, 11, dtype=torch.int64)}[spec.name]
        for spec in captured.inputs
    ]  # fmt: skip
    with torch.no_grad():
        want = next(v for v in captured.graph(*inputs) if isinstance(v, torch.Tensor))
        result = quantized(captured.graph, bits=8)
        got = next(v for v in captured.graph(*inputs) if isinstance(v, torch.Tensor))
    assert len(result.outcomes[0].rewritten) >= 8
    torch.testing.assert_close(got, want, atol=0.05 * float(want.abs().max()), rtol=0)
    assert not torch.equal(got, want)


def test_the_rewritten_model_passes_gradients() -> None:
    graph = tiny_graph()
    quantized(graph, bits=4)
    embedding = nodes(graph, EMBEDDING)
    assert len(embedding) == 1
    norm = [parameter for name, parameter in graph.named_parameters() if "places" in name]
    loss = graph(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 2]]))[0].sum()
    loss.backward()
    assert norm
    assert float(norm[0].grad.abs().max()) > 0  # type: ignore[union-attr]
    for parameter in norm:
        parameter.grad = None


def test_none_may_be_written_as_a_word() -> None:
    assert WeightsConfig(bits="none").bits is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 5},
        {"block_size": 48},
        {"zero_point": "maybe"},
        {"method": "awq2"},
    ],
)
def test_refuses_a_setting(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WeightsConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits: 3 is for method kmeans; method is rtn"),
        ({"bits": 4, "weigh_inputs": True}, "weigh_inputs: True is for method kmeans; method is rtn"),
        ({"bits": 4, "spread_errors": True}, "spread_errors: True is for method kmeans; method is rtn"),
        ({"method": "kmeans"}, "method kmeans has tables for bits 4 and 3; bits is 8"),
        ({"method": "kmeans", "bits": "mixed", "average_bits": 5}, "for bits 4 and 3; bits is mixed"),
        (
            {"method": "kmeans", "bits": 4, "zero_point": "integer"},
            "method kmeans has a table, and no zero points; zero_point is integer",
        ),
        ({"method": "kmeans", "bits": 4, "clip": True}, "clip is for method gptq; method is kmeans"),
    ],
)
def test_refuses_settings_that_do_not_go_with_a_table(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WeightsConfig(**values)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_tied_head_and_embedding_share_one_table(bits: int) -> None:
    graph = captured_tiny("llama", tie_word_embeddings=True).graph
    quantized(graph, bits=bits, method="kmeans", activations="float")
    (table,), head = nodes(graph, EMBEDDING), nodes(graph, LINEAR)[-1]
    assert table.args[1:6] == head.args[1:6]
    assert table.args[5].meta["val"].shape == (1 << bits,)  # type: ignore[union-attr]
    assert {region.bits for region in weight_regions(graph)} == {bits}


def test_inputs_of_a_table_stay_floats_and_the_decision_says_so() -> None:
    graph = tiny_graph()
    (asked,) = quantized(graph, bits=4, method="kmeans").outcomes
    assert not any(node.args[-1] for node in nodes(graph, LINEAR))
    assert {d.text for d in asked.decisions} == {
        "inputs stay floats: codes of a table cannot be multiplied as whole numbers"
    }
    assert len(asked.decisions) == 13
    (spelled,) = quantized(tiny_graph(), bits=4, method="kmeans", activations="float").outcomes
    assert not spelled.decisions


def test_refuses_tables_for_experts() -> None:
    captured = captured_tiny("mixtral")
    result = apply(captured.graph, [entry("weights.quantize", bits=4, method="kmeans")], strict=False)
    assert {refusal.reason for refusal in result.refusals} == {"experts have no tables of values"}


def loss_of(method: str, folder: Path) -> float:
    """The mean squared change of logits by 4-bit weights, on other tokens than those of the calibration."""
    rows = prompts(60, 60)
    want = torch.cat(run(tiny_graph(head_dim=16), rows))
    graph = tiny_graph(head_dim=16)
    config: dict[str, Any] = {"bits": 4, "method": method, "activations": "float"}
    config |= {"weigh_inputs": True} if method == "kmeans" else {"zero_point": "integer"}
    # the table is rounded whatever the method: it would only blur the comparison
    result = apply(
        graph,
        [entry("weights.quantize", embedding=False, **config)],
        calibration=calibration(folder, tokens=2048, window=64),
    )
    assert len(result.outcomes[0].rewritten) == 13
    return float((torch.cat(run(graph, rows)) - want).pow(2).mean())


def test_gptq_loses_less_than_rounding(tmp_path: Path) -> None:
    assert loss_of("gptq", tmp_path) < 0.9 * loss_of("rtn", tmp_path)


def test_tables_weighed_by_inputs_lose_less_than_rounding(tmp_path: Path) -> None:
    assert loss_of("kmeans", tmp_path) < 0.9 * loss_of("rtn", tmp_path)


def test_gptq_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memcompile.passes.weights import calibrated

    first, second = tiny_graph(), tiny_graph()
    entries = [entry("weights.quantize", bits=4, method="gptq")]
    apply(first, entries, calibration=calibration(tmp_path))
    monkeypatch.setattr(calibrated, "sweep", None)
    result = apply(second, entries, calibration=calibration(tmp_path))
    for (name, one), (_, other) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    (found,) = result.calibrations.values()
    # the embedding is rounded: it has no product to calibrate
    assert len(found["regions"]) == 13


def test_gptq_without_text_is_an_error() -> None:
    with pytest.raises(MemcompileError, match=r"MC107 data\.calibration: weights\.quantize needs it"):
        quantized(tiny_graph(), method="gptq")
