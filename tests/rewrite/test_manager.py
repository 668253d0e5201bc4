"""The manager: order, coverage, contradictions, and passes that do not keep their word."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import pytest
import torch
from pydantic import Field

from memcompile.dialect import Cost
from memcompile.errors import MemcompileError
from memcompile.progress import Silent
from memcompile.regions import AttentionRegion, Refusal, attention_nodes, attention_regions
from memcompile.rewrite import registry
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload, WorkloadSizes
from memcompile.rewrite.fingerprint import graph_text
from memcompile.rewrite.manager import apply
from memcompile.rewrite.order import order_graph, ordered
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig
from memcompile.rewrite.registry import load_pass
from memcompile.rewrite.verify import verify
from tests.rewrite.tiny import calibration, entry, prompts, run, tiny_graph


class ShoutConfig(PassConfig):
    """One number."""

    loudness: int = Field(default=1, ge=1)


class Shout(Pass[AttentionRegion, ShoutConfig, int]):
    """Double the scale of attention."""

    name: ClassVar[str] = "test.shout"
    Config: ClassVar[type[ShoutConfig]] = ShoutConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def identity(self) -> ShoutConfig:
        return ShoutConfig()

    def budgets(self) -> tuple[ShoutConfig, ShoutConfig]:
        return ShoutConfig(), ShoutConfig()

    def check(
        self, region: AttentionRegion, config: ShoutConfig, context: Context = NO_CONTEXT
    ) -> int | Refusal:
        return config.loudness

    def rewrite(self, region: AttentionRegion, facts: int, emit: Emit) -> None:
        emit.update(region.node, scale=float(facts))

    def cost(self, region: AttentionRegion, facts: int, workload: Workload) -> Cost:
        return Cost()


class Idle(Shout):
    """Accept, and change nothing."""

    name: ClassVar[str] = "test.idle"

    def rewrite(self, region: AttentionRegion, facts: int, emit: Emit) -> None:
        pass


class Boast(Shout):
    """Tell the journal of a change that was none."""

    name: ClassVar[str] = "test.boast"

    def rewrite(self, region: AttentionRegion, facts: int, emit: Emit) -> None:
        emit.mark(region.node, "not_a_meaning", facts)


class Sneak(Shout):
    """Change a second node behind the journal's back."""

    name: ClassVar[str] = "test.sneak"

    def rewrite(self, region: AttentionRegion, facts: int, emit: Emit) -> None:
        emit.update(region.node, scale=2.0)
        graph = emit.graph_module.graph
        with graph.inserting_before(region.node):
            graph.call_function(operator.neg, (region.node.args[0],)).meta["val"] = None


class Meddle(Shout):
    """Change the graph while only looking."""

    name: ClassVar[str] = "test.meddle"

    def check(
        self, region: AttentionRegion, config: ShoutConfig, context: Context = NO_CONTEXT
    ) -> int | Refusal:
        region.node.kwargs = {**region.node.kwargs, "softcap": 3.0}
        return self.refuse(region, "never")


class Wreck(Shout):
    """Leave a graph that means nothing."""

    name: ClassVar[str] = "test.wreck"

    def rewrite(self, region: AttentionRegion, facts: int, emit: Emit) -> None:
        emit.update(region.node, sinks=4)


class Needy(Shout):
    """Need what nobody provides."""

    name: ClassVar[str] = "test.needy"
    order: ClassVar[Order] = Order(needs=frozenset({"a_miracle"}))


class Circular(Shout):
    """Run after quantisation, and before it."""

    name: ClassVar[str] = "test.circular"
    order: ClassVar[Order] = Order(needs=frozenset({"cache_bits", "float_cache"}))


@pytest.fixture(autouse=True)
def _passes_of_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the passes of this file."""
    known = dict(registry.BUILT_IN)
    for one in (Shout, Idle, Boast, Sneak, Meddle, Wreck, Needy, Circular):
        known[one.name] = f"{__name__}:{one.__name__}"
    here = {
        f"{__name__}:{one.__name__}": one()
        for one in (Shout, Idle, Boast, Sneak, Meddle, Wreck, Needy, Circular)
    }
    load = registry._load
    monkeypatch.setattr(registry, "locations", lambda: known)
    monkeypatch.setattr(registry, "_load", lambda location: here.get(location) or load(location))


def refused(entries: list[Any], **options: Any) -> MemcompileError:
    with pytest.raises(MemcompileError) as caught:
        apply(tiny_graph(), entries, **options)
    return caught.value


def test_passes_run_in_the_order_of_their_needs_not_of_the_plan(tmp_path: Path) -> None:
    entries = [
        entry("kv.quantize"),
        entry("kv.evict", keep_tokens=64),
        entry("attention.static", window_tokens=4, layers=0),
    ]
    result = apply(tiny_graph(), entries, calibration=calibration(tmp_path))
    assert [o.entry.name for o in result.outcomes] == ["attention.static", "kv.evict", "kv.quantize"]


def test_the_order_graph_says_why() -> None:
    loaded = [(e, load_pass(e.name)) for e in (entry("kv.quantize"), entry("kv.evict", keep_tokens=64))]
    graph = order_graph(loaded)
    assert isinstance(graph, nx.DiGraph)
    assert list(graph.edges) == [(1, 0)]
    assert "kept_tokens" in graph.edges[1, 0]["reason"] or "float_cache" in graph.edges[1, 0]["reason"]
    assert [e.name for e, _ in ordered(loaded)] == ["kv.evict", "kv.quantize"]


def test_refuses_a_pass_whose_need_nobody_provides() -> None:
    error = refused([entry("test.needy", where="plan.yaml:5")])
    assert (error.code, error.where) == ("MC109", "plan.yaml:5")
    assert "needs a_miracle" in error.message


def test_refuses_passes_that_must_each_run_before_the_other() -> None:
    error = refused([entry("kv.quantize", where="plan.yaml:5"), entry("test.circular", where="plan.yaml:6")])
    assert error.code == "MC109"
    assert "test.circular must run before kv.quantize (needs float_cache" in error.message
    assert "kv.quantize must run before test.circular (settles cache_bits)" in error.message
    assert "plan.yaml:5" in (error.where or "")


def test_refuses_one_pass_twice_in_one_layer() -> None:
    error = refused(
        [
            entry("kv.evict", keep_tokens=64, layers="0-1", where="plan.yaml:5"),
            entry("kv.evict", keep_tokens=48, layers="1-2", where="plan.yaml:6"),
        ]
    )
    assert (error.code, error.where) == ("MC109", "plan.yaml:5, plan.yaml:6")
    assert "asked for twice in layer 1" in error.message


def test_one_pass_twice_in_different_layers_is_fine() -> None:
    graph = tiny_graph()
    entries = [
        entry("kv.evict", keep_tokens=64, layers="0-1"),
        entry("kv.evict", keep_tokens=48, layers="2"),
    ]
    apply(graph, entries)
    kept = [region.evict.keep_tokens for region in attention_regions(graph) if region.evict]
    assert kept == [64, 64, 48]


def test_one_pass_twice_in_different_heads_of_a_layer_is_fine() -> None:
    graph = tiny_graph(kv_heads=4)
    entries = [
        entry("attention.static", window_tokens=3, layers=1, heads=[0, 2]),
        entry("attention.static", window_tokens=5, layers=1, heads=[3]),
    ]
    apply(graph, entries)
    found = {r.region: (r.kv_head_ids, r.window_tokens) for r in attention_regions(graph) if r.layer == 1}
    assert found == {
        "1.window": ((0, 2), 3),
        "1.full.full": ((1,), None),
        "1.full.window": ((3,), 5),
    }
    verify(graph, "the test")


def test_unknown_pass_suggests_the_nearest() -> None:
    with pytest.raises(MemcompileError, match=r"MC105 kv\.evictt: unknown pass") as caught:
        load_pass("kv.evictt", where="plan.yaml:5")
    assert caught.value.fix == "did you mean kv.evict?"
    with pytest.raises(MemcompileError) as caught:
        load_pass("zzz")
    named = (caught.value.fix or "").removeprefix("the passes are ").split(", ")
    assert {"attention.static", "kv.evict", "weights.quantize"} <= set(named)
    assert named == sorted(named)


def test_expect_is_met_or_named() -> None:
    graph = tiny_graph(each={1: {"window": 4}})
    result = apply(graph, [entry("kv.evict", keep_tokens=64, expect=2)])
    assert len(result.outcomes[0].rewritten) == 2
    with pytest.raises(MemcompileError, match="expect is 3, and 2 regions were rewritten") as caught:
        apply(
            tiny_graph(each={1: {"window": 4}}),
            [entry("kv.evict", keep_tokens=64, expect=3, where="plan.yaml:9")],
        )
    assert (caught.value.code, caught.value.where) == ("MC302", "plan.yaml:9")
    assert "already holds only the window of 4" in caught.value.message


def test_refused_everywhere_says_each_reason_once() -> None:
    graph = tiny_graph(each={layer: {"window": 4} for layer in range(3)})
    with pytest.raises(MemcompileError, match="MC303") as caught:
        apply(graph, [entry("kv.evict", keep_tokens=64)])
    assert caught.value.message.count("already holds only the window") == 1
    assert "layer 0 (model.layers.0.self_attn) and 2 more" in caught.value.message


def test_a_model_without_attention_is_named_as_such() -> None:
    graph = tiny_graph(layers=0)
    with pytest.raises(MemcompileError, match=r"MC303 kv\.evict: the model has no attention region"):
        apply(graph, [entry("kv.evict", keep_tokens=64)])


def test_a_budget_of_everything_is_an_error_at_the_workload() -> None:
    workload = WorkloadSizes(prompt_tokens=1024)
    error = refused([entry("kv.evict", keep_tokens=2048, where="plan.yaml:14")], workload=workload)
    assert (error.code, error.where, error.exit_code) == ("MC305", "plan.yaml:14", 4)
    assert "keep_tokens is 2048 and the workload's prompt is 1024 tokens" in error.message


def test_heads_are_refused_where_the_pass_acts_on_layers() -> None:
    error = refused([entry("kv.evict", keep_tokens=64, heads=[0])])
    assert error.code == "MC102"
    assert "kv.evict.heads" in error.message


def test_a_selector_beyond_the_layers_is_an_error() -> None:
    error = refused([entry("kv.evict", keep_tokens=64, layers="7", where="plan.yaml:4")])
    assert error.code == "MC301"


def test_calibration_that_is_missing_is_asked_for() -> None:
    error = refused([entry("kv.quantize", where="plan.yaml:4")])
    assert (error.code, error.where) == ("MC107", "plan.yaml:4")
    assert "data.calibration" in error.message


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("test.idle", "changed nothing in it"),
        ("test.boast", "said that it changed the graph, and did not"),
        ("test.sneak", "made nodes without the journal: neg"),
        ("test.meddle", "check changed the graph"),
        ("test.wreck", "sinks or strided blocks without a window"),
    ],
)
def test_a_pass_that_breaks_its_word_is_found_out(name: str, rule: str) -> None:
    error = refused([entry(name)])
    assert (error.code, error.exit_code) == ("MC901", 1)
    assert name in error.message
    assert rule in error.message


def test_a_pass_from_elsewhere_runs_like_ours() -> None:
    graph = tiny_graph()
    result = apply(graph, [entry("test.shout", loudness=2, layers="0-1")])
    assert [node.kwargs["scale"] == 2.0 for node in attention_nodes(graph)] == [True, True, False]
    assert [e.action for e in result.journal.entries] == ["changed", "changed"]
    assert result.as_dict()["passes"][0]["rewritten"] == ["0", "1"]
    assert result.outcomes[0].cost is None
    assert result.refusals == ()


def test_an_empty_plan_changes_nothing() -> None:
    graph = tiny_graph()
    before = graph_text(graph)
    assert apply(graph, []).outcomes == ()
    assert graph_text(graph) == before


def test_progress_hears_of_every_pass(tmp_path: Path) -> None:
    class Heard(Silent):
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.updates: list[tuple[int, int]] = []

        def stage(self, name: str) -> None:
            self.stages.append(name)

        def update(self, done: int, total: int) -> None:
            self.updates.append((done, total))

    heard = Heard()
    apply(tiny_graph(), [entry("kv.quantize")], calibration=calibration(tmp_path), progress=heard)
    assert heard.stages == ["kv.quantize", "calibrate for kv.quantize"]
    assert heard.updates == [(1, 3), (2, 3), (3, 3)]


def test_the_outcome_predicts_the_state(tmp_path: Path) -> None:
    workload = WorkloadSizes(prompt_tokens=100, new_tokens=20, batch=2)
    result = apply(
        tiny_graph(),
        [
            entry("attention.static", window_tokens=10, sink_tokens=2, layers=0),
            entry("kv.quantize", layers="!0"),
        ],
        workload=workload,
        calibration=calibration(tmp_path),
    )
    static, quantize = result.outcomes
    assert static.cost is not None
    assert quantize.cost is not None
    assert static.cost.state_bytes == 2 * 12 * 2 * 2 * 8 * 4  # batch, tokens, k and v, heads, width, bytes
    assert quantize.cost.state_bytes == 2 * (2 * 120 * 2 * 2 * 8 * 1)  # two layers


def test_codes_are_predicted_of_what_eviction_leaves(tmp_path: Path) -> None:
    result = apply(
        tiny_graph(),
        [entry("kv.evict", keep_tokens=40), entry("kv.quantize")],
        workload=WorkloadSizes(prompt_tokens=100, new_tokens=20),
        calibration=calibration(tmp_path),
    )
    predicted = [outcome.cost.state_bytes for outcome in result.outcomes if outcome.cost]
    assert predicted == [
        3 * 60 * 2 * 2 * 8 * size for size in (4, 1)
    ]  # layers, tokens, k and v, heads, width


def test_the_rewritten_graph_still_runs(tmp_path: Path) -> None:
    graph = tiny_graph()
    apply(graph, [entry("attention.static", window_tokens=4, heads=[1])])
    assert all(torch.isfinite(row).all() for row in run(graph, prompts(1, 30)))
