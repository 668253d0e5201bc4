"""The laws of passes: what must hold of every pass in the registry, for every head layout and float type."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.regions import AttentionRegion, FfnRegion
from memcompile.rewrite.cards import HEADINGS, card, pass_page
from memcompile.rewrite.entry import WorkloadSizes
from memcompile.rewrite.fingerprint import graph_lines, graph_text
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.rewrite.registry import BUILT_IN, load_pass
from memcompile.rewrite.verify import verify
from tests.conftest import ROOT
from tests.rewrite.tiny import calibration, entry, prompts, run, tiny_graph

PASSES = sorted(BUILT_IN)
PRESETS = [(name, preset) for name in PASSES for preset in load_pass(name).presets]
LAYOUTS = {"MHA": 4, "GQA": 2, "MQA": 1}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (1, 63, 64, 65)


def graph(name: str, layout: str = "GQA", dtype: str = "float32", causal: bool = True) -> fx.GraphModule:
    """A graph that the pass `name` acts on."""
    each = {layer: {"causal": causal} for layer in range(3)}
    gated = name.startswith("ffn.")
    return tiny_graph(kv_heads=LAYOUTS[layout], dtype=TYPES[dtype], gated=gated, each=each)


def refused_graph(name: str) -> fx.GraphModule:
    """A graph whose every region the pass refuses: attention without a cache, weights without storage."""
    if name.startswith(("weights.", "ffn.")):
        return tiny_graph(computed=True, gated=name.startswith("ffn."))
    return graph(name, causal=False)


def rewrite(graph_module: fx.GraphModule, name: str, config: Any, folder: Path) -> RewriteResult:
    return apply(graph_module, [entry(name, config)], calibration=calibration(folder), strict=False)


def preset_values(name: str, preset: str) -> dict[str, Any]:
    """The preset, with the budget it leaves to the plan."""
    one = load_pass(name)
    values = dict(one.presets[preset].values)
    _, most = one.budgets()
    for group in one.Config.exclusive:
        if not set(group) & set(values):
            given = most.model_dump(include=set(group), exclude_none=True)
            values.update(given)
    return values


def configs(name: str) -> Iterator[Any]:
    one = load_pass(name)
    yield one.identity()
    yield from one.budgets()
    for preset in one.presets:
        yield one.Config(**preset_values(name, preset))


@pytest.mark.parametrize("name", PASSES)
def test_the_card_is_complete(name: str) -> None:
    read = card(name)
    assert set(HEADINGS) <= set(read.sections)
    assert read.summary.endswith(".")


@pytest.mark.parametrize("name", PASSES)
def test_the_page_equals_the_code(name: str) -> None:
    page = (ROOT / "docs" / "passes" / f"{name}.md").read_text(encoding="utf-8")
    # above the page stands a note on how it was made
    assert page.endswith(pass_page(name)), "run `make docs`"


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_holds_no_state(name: str) -> None:
    one = load_pass(name)
    assert vars(one) == {}
    assert load_pass(name) is one
    assert one.name == name


@pytest.mark.parametrize("name", PASSES)
def test_every_config_round_trips(name: str) -> None:
    kind = load_pass(name).Config
    for config in configs(name):
        assert kind.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", PASSES)
def test_an_unknown_key_is_refused(name: str) -> None:
    one = load_pass(name)
    given = {**one.identity().model_dump(exclude_unset=True), "no_such_key": 1}
    with pytest.raises(ValidationError, match="no_such_key"):
        one.Config(**given)


@pytest.mark.parametrize("name", PASSES)
def test_a_config_is_frozen(name: str) -> None:
    config = load_pass(name).identity()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(type(config).model_fields)), 1)


@pytest.mark.parametrize("name", PASSES)
def test_every_setting_is_described(name: str) -> None:
    for key, field in load_pass(name).Config.model_fields.items():
        assert field.description, key


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_is_a_legal_config_and_names_its_source(name: str, preset: str) -> None:
    one = load_pass(name)
    one.Config(**preset_values(name, preset))
    assert one.presets[preset].summary.endswith(".")
    assert re.search(r"arXiv:\d{4}\.\d{5}|ONNX Runtime", one.presets[preset].paper)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PASSES)
def test_the_identity_setting_equals_the_original(name: str, layout: str, dtype: str, tmp_path: Path) -> None:
    original, rewritten = graph(name, layout, dtype), graph(name, layout, dtype)
    rewrite(rewritten, name, load_pass(name).identity(), tmp_path)
    rows = prompts(*LENGTHS)
    for want, got in zip(run(original, rows), run(rewritten, rows), strict=True):
        # the same operations in the same order: not one bit may differ
        torch.testing.assert_close(got, want, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["smallest", "largest"])
@pytest.mark.parametrize("name", PASSES)
def test_the_smallest_and_largest_budgets_run(
    name: str, which: str, layout: str, dtype: str, tmp_path: Path
) -> None:
    rewritten = graph(name, layout, dtype)
    smallest, largest = load_pass(name).budgets()
    result = rewrite(rewritten, name, smallest if which == "smallest" else largest, tmp_path)
    assert result.outcomes[0].rewritten == result.outcomes[0].selected
    assert len(result.outcomes[0].rewritten) >= 3
    verify(rewritten, "the test")
    rows = prompts(*LENGTHS)
    together = run(rewritten, rows)
    for row, got in zip(rows, together, strict=True):
        assert torch.isfinite(got).all()
        # a batch of different lengths equals one by one; bfloat16 keeps 8 bits of logits of about 1
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        torch.testing.assert_close(run(rewritten, [row])[0], got, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", PASSES)
def test_a_refusal_leaves_the_graph_equal(name: str, tmp_path: Path) -> None:
    rewritten = refused_graph(name)
    before = graph_text(rewritten)
    smallest, _ = load_pass(name).budgets()
    (outcome,) = rewrite(rewritten, name, smallest, tmp_path).outcomes
    assert outcome.rewritten == ()
    assert len(outcome.refusals) == len(outcome.selected) >= 3
    assert graph_text(rewritten) == before
    for refusal in outcome.refusals:
        assert refusal.pass_name == name
        assert re.search(r"layers\.\d|embedding|head", refusal.where)
        assert refusal.reason


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_refused_everywhere_is_an_error(name: str, tmp_path: Path) -> None:
    smallest, _ = load_pass(name).budgets()
    with pytest.raises(MemcompileError, match=f"MC303 {re.escape(name)}: refused in all \\d+ ") as caught:
        apply(refused_graph(name), [entry(name, smallest)], calibration=calibration(tmp_path))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", PASSES)
def test_a_second_run_finds_nothing_new(name: str, tmp_path: Path) -> None:
    rewritten = graph(name)
    smallest, _ = load_pass(name).budgets()
    rewrite(rewritten, name, smallest, tmp_path)
    once = graph_text(rewritten)
    (outcome,) = rewrite(rewritten, name, smallest, tmp_path).outcomes
    assert graph_text(rewritten) == once
    assert outcome.rewritten == ()


@pytest.mark.parametrize("name", PASSES)
def test_the_journal_names_every_node_that_differs(name: str, tmp_path: Path) -> None:
    rewritten = graph(name)
    before = graph_lines(rewritten)
    smallest, _ = load_pass(name).budgets()
    journal = rewrite(rewritten, name, smallest, tmp_path).journal
    after = graph_lines(rewritten)
    differing = {node for node in {*before, *after} if before.get(node) != after.get(node)}
    assert differing
    assert differing <= journal.names()
    assert {written.pass_name for written in journal.entries} == {name}


@pytest.mark.parametrize("name", PASSES)
def test_the_identity_changes_nothing_at_any_workload(name: str, tmp_path: Path) -> None:
    workload = WorkloadSizes(prompt_tokens=100, new_tokens=10)
    with pytest.raises(MemcompileError, match=f"MC305 {re.escape(name)}: ") as caught:
        apply(
            graph(name),
            [entry(name, load_pass(name).identity(), where="plan.yaml:7")],
            workload=workload,
            calibration=calibration(tmp_path),
        )
    assert caught.value.where == "plan.yaml:7"
    assert caught.value.fix


@pytest.mark.parametrize("name", PASSES)
def test_the_smallest_budget_is_predicted_to_hold_less(name: str) -> None:
    one, workload = load_pass(name), WorkloadSizes(prompt_tokens=1000, new_tokens=10, batch=2)
    smallest, _ = one.budgets()
    # wide enough that the largest block is filled
    regions = one.regions(tiny_graph(head_dim=64))
    for region in one.selected(regions, smallest):
        cost = one.cost(region, one.check(region, smallest), workload)
        if isinstance(region, AttentionRegion):
            whole = 2 * 1010 * 2 * region.kv_heads * region.head_dim * 4
            # a pass that chooses while the prompt is read leaves the cache whole
            chooses = "prompt_choice" in one.order.provides
            assert cost.state_bytes == whole if chooses else cost.state_bytes < whole
        elif isinstance(region, FfnRegion):
            assert cost.bytes_moved < 3 * region.neurons * region.width * 4
        else:
            # of an embedding, only the looked up rows move
            rows = 2 if region.kind == "embedding" else region.rows
            activations = 2 * (region.width + (0 if region.kind == "embedding" else region.rows)) * 4
            whole = rows * region.width * 4 + activations
            # zeros among weights are stored like other numbers
            zeros = "weight_zeros" in one.order.provides
            assert cost.bytes_moved == whole if zeros else cost.bytes_moved < whole


def test_the_registry_loads_passes_only_when_asked() -> None:
    script = (
        "import sys, memcompile.rewrite; from memcompile.rewrite.registry import pass_names;pass_names();"
        "import memcompile.rewrite.selectors, memcompile.rewrite.entry;"
        "sys.exit('torch' in sys.modules or any('passes' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
