"""`attention.static`: windows, sinks and strided blocks, for layers and for heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.passes.attention.static import UNLIMITED, StaticConfig
from memcompile.regions import argument, attention_nodes, attention_regions
from memcompile.rewrite.costs import windowed_tokens
from memcompile.rewrite.fingerprint import node_text
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.rewrite.registry import load_pass
from memcompile.rewrite.selectors import Site
from tests.rewrite.tiny import entry, prompts, run, tiny_graph


def static(graph: fx.GraphModule, **options: Any) -> RewriteResult:
    return apply(graph, [entry("attention.static", **options)])


def refusal(graph: fx.GraphModule, **options: Any) -> str:
    result = apply(graph, [entry("attention.static", **options)], strict=False)
    assert result.outcomes[0].rewritten == ()
    return result.refusals[0].reason


def visible(graph: fx.GraphModule, tokens: int) -> list[list[list[int]]]:
    """For each layer, and each query, the positions whose values reach the output of any head."""
    seen = []
    for node in attention_nodes(graph):
        attributes = {k: v for k, v in node.kwargs.items() if k in ("window", "sinks", "block", "stride")}
        q = torch.zeros(1, 1, tokens, 1)
        v = torch.eye(tokens).reshape(1, 1, tokens, tokens)
        out, _, _ = torch.ops.memcompile.attention(q, q, v, scale=1.0, **attributes)
        seen.append([row.nonzero().flatten().tolist() for row in out[0, 0]])
    return seen


def test_a_window_with_sinks_sees_the_last_and_the_first_tokens() -> None:
    graph = tiny_graph(layers=1)
    static(graph, window_tokens=3, sink_tokens=2)
    (rows,) = visible(graph, 8)
    assert rows[7] == [0, 1, 5, 6, 7]
    assert rows[2] == [0, 1, 2]


def test_strided_blocks_stay_visible() -> None:
    graph = tiny_graph(layers=1)
    static(graph, window_tokens=2, block_tokens=2, block_stride=3)
    (rows,) = visible(graph, 12)
    assert rows[11] == [0, 1, 6, 7, 10, 11]


def test_only_the_selected_layers_are_windowed() -> None:
    graph = tiny_graph(layers=4)
    static(graph, window_tokens=5, layers="1-2")
    assert [r.window_tokens for r in attention_regions(graph)] == [None, 5, 5, None]


def test_full_layers_keep_full_attention() -> None:
    graph = tiny_graph(layers=6)
    static(graph, window_tokens=5, full_layers="33%-67%")
    assert [r.window_tokens for r in attention_regions(graph)] == [5, 5, None, None, 5, 5]


def test_layers_narrow_what_full_layers_leave() -> None:
    graph = tiny_graph(layers=6)
    static(graph, window_tokens=5, full_layers="33%-67%", layers="1-5")
    assert [r.window_tokens for r in attention_regions(graph)] == [None, 5, None, None, 5, 5]


def test_full_layers_that_do_not_exist_are_an_error() -> None:
    with pytest.raises(MemcompileError, match="MC301"):
        static(tiny_graph(), window_tokens=5, full_layers="7")


@pytest.mark.parametrize(
    ("preset", "layers", "full"),
    [
        ("longgen", 30, range(10, 20)),
        ("longgen", 32, range(11, 21)),
        ("longgen", 3, range(1, 2)),
        ("longgen", 2, range(0)),
        ("masformer", 24, range(8)),
        ("masformer", 2, range(1)),
        ("streaming_llm", 30, range(0)),
    ],
)
def test_a_preset_leaves_these_layers_full(preset: str, layers: int, full: range) -> None:
    one = load_pass("attention.static")
    config = one.Config(**one.presets[preset].values)
    sites = [Site(layer, "") for layer in range(layers)]
    assert one.layers(config, sites) == set(range(layers)) - set(full)


def test_a_window_of_the_whole_length_changes_no_bit() -> None:
    rows = prompts(5, 20)
    graph = tiny_graph()
    want = run(graph, rows)
    static(graph, window_tokens=20)
    for got, expected in zip(run(graph, rows), want, strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_a_shorter_window_changes_only_the_tokens_beyond_it() -> None:
    rows = prompts(20)
    graph = tiny_graph(layers=1)
    (want,) = run(graph, rows)
    static(graph, window_tokens=8)
    (got,) = run(graph, rows)
    torch.testing.assert_close(got[:8], want[:8], atol=0, rtol=0)
    assert (got[8:] - want[8:]).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize(
    ("kv_heads", "heads"),
    [(2, [0]), (2, [1]), (4, [0, 2]), (4, [1, 2]), (4, [0, 3]), (4, "1-3"), (2, {"query": "2-3"})],
)
def test_listed_heads_are_windowed_and_the_others_stay_full(kv_heads: int, heads: Any) -> None:
    rows = prompts(3, 20)
    split, every, none = (tiny_graph(kv_heads=kv_heads, layers=1) for _ in range(3))
    static(split, window_tokens=4, sink_tokens=1, heads=heads)
    static(every, window_tokens=4, sink_tokens=1)
    windowed = next(r.kv_head_ids for r in attention_regions(split) if r.region == "0.window")
    group = 4 // kv_heads
    got, all_windowed, all_full = (attended(graph, rows) for graph in (split, every, none))
    for head in range(4):
        want = all_windowed if head // group in windowed else all_full
        torch.testing.assert_close(got[:, head], want[:, head], atol=1e-6, rtol=0)
    assert (all_windowed - all_full).abs().max() > 1e-3


def attended(graph: fx.GraphModule, rows: list[list[int]]) -> torch.Tensor:
    """What the output projection reads, [B,H,T,D]."""
    projection = next(n for n in graph.graph.nodes if "o_proj" in str(n.args) and n.op == "call_function")
    caught: list[torch.Tensor] = []

    class Catch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n is projection.args[0]:
                caught.append(result)
            return result

    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[1] * (longest - len(row))] for row in rows])
    positions = torch.tensor([[*range(len(row)), *[-1] * (longest - len(row))] for row in rows])
    with torch.no_grad():
        Catch(graph).run(ids, positions)
    (flat,) = caught
    return flat.reshape(flat.shape[0], flat.shape[1], 4, -1).transpose(1, 2)


def test_all_heads_of_a_layer_are_windowed_without_a_split() -> None:
    graph = tiny_graph()
    static(graph, window_tokens=4, heads="0-1")
    assert [(r.region, r.window_tokens) for r in attention_regions(graph)] == [("0", 4), ("1", 4), ("2", 4)]


def test_heads_may_differ_from_layer_to_layer() -> None:
    graph = tiny_graph()
    static(graph, window_tokens=4, heads={"0": [1], "2": [0, 1]})
    found = {r.region: (r.kv_head_ids, r.window_tokens) for r in attention_regions(graph)}
    assert found == {
        "0.full": ((0,), None),
        "0.window": ((1,), 4),
        "1": ((0, 1), None),
        "2": ((0, 1), 4),
    }


def test_golden_of_a_split_layer() -> None:
    graph = tiny_graph(layers=1, kv_heads=2)
    before = {node.name for node in graph.graph.nodes}
    static(graph, window_tokens=4, sink_tokens=1, heads=[0])
    made = [f"{n.name} = {node_text(n)}" for n in graph.graph.nodes if n.name not in before]
    common = "past_k=None, past_v=None, positions=%position_ids"
    assert [line.replace("mask=None, ", "") for line in made] == [
        "slice_tensor = call_function aten.slice.Tensor(%transpose, 1, 2, 4)",
        "slice_tensor_1 = call_function aten.slice.Tensor(%transpose_1, 1, 1, 2)",
        "slice_tensor_2 = call_function aten.slice.Tensor(%transpose_2, 1, 1, 2)",
        "attention_default = call_function memcompile.attention.default(%slice_tensor, %slice_tensor_1, "
        f"%slice_tensor_2, {common}, region='0.full', scale=0.3535533905932738)  # kv_head_ids=(1,)",
        "getitem_1 = call_function _operator.getitem(%attention_default, 0)",
        "slice_tensor_3 = call_function aten.slice.Tensor(%transpose, 1, 0, 2)",
        "slice_tensor_4 = call_function aten.slice.Tensor(%transpose_1, 1, 0, 1)",
        "slice_tensor_5 = call_function aten.slice.Tensor(%transpose_2, 1, 0, 1)",
        "attention_default_1 = call_function memcompile.attention.default(%slice_tensor_3, %slice_tensor_4, "
        f"%slice_tensor_5, block=0, {common}, region='0.window', scale=0.3535533905932738, sinks=1, "
        "stride=0, window=4)  # kv_head_ids=(0,)",
        "getitem_2 = call_function _operator.getitem(%attention_default_1, 0)",
        "cat_default = call_function aten.cat.default([%getitem_2, %getitem_1], 1)",
    ]


def test_the_twin_of_the_golden_is_refused() -> None:
    reason = refusal(tiny_graph(layers=1, kv_heads=2), window_tokens=4, sink_tokens=1, heads={"query": [0]})
    assert "query heads 0-1 share key/value head 0, and only 0 of them was chosen" in reason


def test_a_split_layer_stays_where_it_was_in_the_model() -> None:
    graph = tiny_graph()
    static(graph, window_tokens=4, heads=[0], layers=1)
    split = [r for r in attention_regions(graph) if r.layer == 1]
    assert {r.path for r in split} == {"model.layers.1.self_attn"}
    assert all(r.node.meta["made_by"] == "attention.static" for r in split)


def test_refuses_a_mask_computed_at_run_time() -> None:
    assert "its mask is computed at run time" in refusal(tiny_graph(masked=True), window_tokens=4)


def test_refuses_attention_that_is_not_causal() -> None:
    each = {layer: {"causal": False} for layer in range(3)}
    assert "a window needs causal attention" in refusal(tiny_graph(each=each), window_tokens=4)


def test_refuses_heads_that_do_not_exist() -> None:
    reason = refusal(tiny_graph(), window_tokens=4, heads=[2])
    assert reason == "heads [2]: the layer has 2 key/value heads (0-1), so head 2 does not exist"


@pytest.mark.parametrize(
    ("own", "wanted", "result"),
    [
        ({"window": 8}, {"window_tokens": 4}, (4, 0, 0, 0)),
        ({"window": 8}, {"window_tokens": 4, "sink_tokens": 2}, (4, 0, 0, 0)),
        ({"window": 8}, {"window_tokens": 4, "block_tokens": 2, "block_stride": 2}, (4, 0, 0, 0)),
        ({"window": 8, "sinks": 4}, {"window_tokens": 4, "sink_tokens": 2}, (4, 2, 0, 0)),
        ({"window": 8, "sinks": 4}, {"window_tokens": 16, "sink_tokens": 2}, (8, 2, 0, 0)),
        (
            {"window": 8, "block": 2, "stride": 3},
            {"window_tokens": 4, "block_tokens": 2, "block_stride": 3},
            (4, 0, 2, 3),
        ),
        ({"window": 8, "block": 2, "stride": 3}, {"window_tokens": 16}, (8, 0, 0, 0)),
    ],
)
def test_a_window_of_the_models_own_is_narrowed_never_widened(
    own: dict[str, int], wanted: dict[str, int], result: tuple[int, ...]
) -> None:
    graph, plain = tiny_graph(layers=1, each={0: own}), tiny_graph(layers=1, each={0: own})
    new = tiny_graph(layers=1)
    static(graph, **wanted)
    static(new, **wanted)
    (region,) = attention_regions(graph)
    assert (region.window_tokens, region.sinks, region.block, region.stride) == result
    for got, before, asked in zip(
        visible(graph, 24)[0], visible(plain, 24)[0], visible(new, 24)[0], strict=True
    ):
        assert set(got) <= set(before) & set(asked)


def test_what_the_models_own_window_does_not_reach_is_recorded() -> None:
    graph = tiny_graph(each={1: {"window": 8}})
    result = static(graph, window_tokens=4, sink_tokens=2)
    (decision,) = result.decisions
    assert (decision.pass_name, decision.region) == ("attention.static", "1")
    assert "sinks beyond the first 0 tokens: the model's own window of 8 does not reach them" in decision.text


def test_refuses_a_window_that_is_already_as_narrow() -> None:
    each = {layer: {"window": 8} for layer in range(3)}
    reason = refusal(tiny_graph(each=each), window_tokens=8, sink_tokens=4)
    assert reason == "it already sees no more than a window of 8 tokens"


def test_refuses_strided_blocks_that_do_not_combine() -> None:
    each = {layer: {"window": 8, "block": 2, "stride": 3} for layer in range(3)}
    reason = refusal(tiny_graph(each=each), window_tokens=4, block_tokens=4, block_stride=2)
    assert "blocks of 2 tokens, one in 3, which do not combine with blocks of 4, one in 2" in reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_tokens": 0}, "greater than or equal to 1"),
        ({"window_tokens": 2 * UNLIMITED}, "less than or equal to"),
        ({"window_tokens": 4, "sink_tokens": -1}, "greater than or equal to 0"),
        ({"window_tokens": 4, "block_tokens": 2}, "give both or none"),
        ({"window_tokens": "4"}, "valid integer"),
        ({"window_tokens": True}, "valid integer"),
        ({"window_tokens": 4, "full_layers": "5-2"}, "not a range"),
        ({}, "Field required"),
    ],
)
def test_refuses_a_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StaticConfig(**values)


@pytest.mark.parametrize(
    ("total", "window", "sinks", "block", "stride"),
    [
        (100, 10, 4, 0, 0),
        (12, 10, 4, 0, 0),
        (5, 10, 4, 0, 0),
        (100, 10, 3, 4, 5),
        (64, 1, 0, 1, 1),
        (65, 63, 2, 1, 2),
    ],
)
def test_the_predicted_cache_is_what_the_last_query_sees(
    total: int, window: int, sinks: int, block: int, stride: int
) -> None:
    graph = tiny_graph(
        layers=1, each={0: {"window": window, "sinks": sinks, "block": block, "stride": stride}}
    )
    assert windowed_tokens(total, window, sinks, block, stride) == len(visible(graph, total)[0][-1])


def test_arguments_passed_by_position_are_replaced_in_place() -> None:
    graph = tiny_graph(layers=1)
    (node,) = attention_nodes(graph)
    assert len(node.args) > 3
    static(graph, window_tokens=4)
    assert argument(node, "window") == 4
    graph.graph.lint()
