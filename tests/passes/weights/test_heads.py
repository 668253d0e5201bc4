"""`weights.prune` with granularity heads: which go, that the rest computes the same, what composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from memcompile.backends.torch import TorchSession
from memcompile.calibrate.collect import CalibrationData, token_windows
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.passes.weights.head_choice import choose
from memcompile.passes.weights.heads import HeadsRegion, head_regions
from memcompile.program import build_program
from memcompile.regions import attention_regions, weight_regions
from memcompile.rewrite.manager import RewriteResult, apply
from memcompile.weights.lazy import Concat
from memcompile.weights.parameter import LazyParameter
from tests.models import captured_tiny, save_tiny
from tests.passes.test_on_models import generate, rows_of
from tests.rewrite.tiny import entry, prompts, run, tiny_graph

HEADS: dict[str, Any] = {"granularity": "heads", "criterion": "activation", "sparsity": 0.5}
LAYOUTS = {"MHA": 4, "GQA": 2, "MQA": 1}
# with biases, norms of queries and keys, windows and softcap, one product for all three, two ways of norms
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "phi3", "mixtral")


def text(folder: Path, count: int = 8) -> CalibrationData:
    return CalibrationData(token_windows(prompts(32 * count)[0], 32), cache=folder)


def pruned(graph: fx.GraphModule, folder: Path, *more: Any, **config: Any) -> RewriteResult:
    entries = [entry("weights.prune", **{**HEADS, **config}), *more]
    return apply(graph, entries, calibration=text(folder))


def logits(graph: fx.GraphModule, count: int = 20) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = graph(torch.tensor(prompts(count)), torch.arange(count)[None])[0]
    return found


def silence(graph: fx.GraphModule, silent: dict[int, list[int]]) -> None:
    """Zero what some query heads give: their columns of the product that reads them."""
    for region in head_regions(graph):
        weight = region.reader.stored
        assert weight is not None
        changed = weight.clone()
        for head in silent.get(region.layer, []):
            changed[:, head * region.head_width : (head + 1) * region.head_width] = 0
        changed = changed.t().contiguous() if region.reader.transposed else changed
        owner, _, last = str(region.reader.weight.target).rpartition(".")
        setattr(graph.get_submodule(owner), last, torch.nn.Parameter(changed))


def sizes(graph: fx.GraphModule) -> list[tuple[int, int]]:
    return [(region.heads, region.kv_heads) for region in attention_regions(graph)]


def stored(graph: fx.GraphModule) -> int:
    return sum(region.rows * region.width for region in weight_regions(graph))


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_give_nothing_are_the_ones_that_go(layout: str, criterion: str, tmp_path: Path) -> None:
    graph = tiny_graph(kv_heads=LAYOUTS[layout])
    silence(graph, {0: [0, 1], 1: [2, 3], 2: [0, 1]})
    rows = prompts(1, 30, 17)
    want = run(graph, rows)
    result = pruned(graph, tmp_path, criterion=criterion)
    kv_heads = {"MHA": 2, "GQA": 1, "MQA": 1}[layout]
    assert sizes(graph) == [(2, kv_heads)] * 3
    assert {d.text for d in result.decisions} == {
        f"2 of 4 query heads and {kv_heads} of {LAYOUTS[layout]} key/value heads stay"
    }
    for found, expected in zip(run(graph, rows), want, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_computes_what_it_did(family: str, tmp_path: Path) -> None:
    graph, silenced = captured_tiny(family).graph, captured_tiny(family).graph
    before = stored(graph)
    pruned(graph, tmp_path, sparsity=0.25)
    gone: dict[int, list[int]] = {}
    for region, whole in zip(head_regions(graph), head_regions(silenced), strict=True):
        kept = kept_heads(region, whole)
        gone[whole.layer] = [head for head in range(whole.attention.heads) if head not in kept]
    silence(silenced, gone)
    assert sum(len(heads) for heads in gone.values()) * 4 == sum(heads for heads, _ in sizes(silenced))
    torch.testing.assert_close(logits(graph), logits(silenced), atol=2e-5, rtol=0)
    products = [product for region in head_regions(silenced) for product in region.products]
    # a quarter of the rows and columns of heads
    assert (before - stored(graph)) * 4 == sum(product.rows * product.width for product in products)


def kept_heads(region: HeadsRegion, whole: HeadsRegion) -> list[int]:
    """Which of the whole layer's heads a pruned one has: by the columns of the product that reads them."""
    now, then = region.reader.stored, whole.reader.stored
    assert now is not None
    assert then is not None
    width = whole.head_width
    return [
        head
        for head in range(whole.attention.heads)
        if any(
            torch.equal(now[:, i * width : (i + 1) * width], then[:, head * width : (head + 1) * width])
            for i in range(region.attention.heads)
        )
    ]


def test_layers_may_keep_different_numbers_of_heads_and_at_least_one(tmp_path: Path) -> None:
    graph = tiny_graph(kv_heads=4)
    silence(graph, {0: [0, 1, 3], 2: [1]})
    rows = prompts(30)
    want = run(graph, rows)
    pruned(graph, tmp_path, sparsity=1 / 3)
    assert sizes(graph) == [(1, 1), (4, 4), (3, 3)]
    torch.testing.assert_close(run(graph, rows)[0], want[0], atol=1e-5, rtol=0)


def test_units_are_ranked_over_all_layers() -> None:
    scores = {"0": torch.tensor([0.1, 100.0]), "1": torch.tensor([0.3, 0.2, 0.01])}
    assert choose(scores, {"0": 1, "1": 1}, 0.4) == {"0": [1], "1": [0, 1]}
    # the best unit of a layer stays whatever it is worth
    assert choose(scores, {"0": 1, "1": 1}, 0.99) == {"0": [1], "1": [0]}
    # a unit of two heads counts as two, and one that no longer fits stays
    assert choose(scores, {"0": 2, "1": 1}, 0.15) == {"0": [0, 1], "1": [0, 1]}
    with pytest.raises(MemcompileError, match=r"MC305 .* of 7 query heads in 2 layers is 0, and at least 1"):
        choose(scores, {"0": 2, "1": 1}, 0.05)


def test_fitting_the_reading_product_again_makes_up_for_some_of_it(tmp_path: Path) -> None:
    errors = {}
    for refit in (False, True):
        graph = captured_tiny("llama").graph
        pruned(graph, tmp_path, refit=refit)
        errors[refit] = float((logits(graph, 200) - logits(captured_tiny("llama").graph, 200)).pow(2).mean())
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("olmoe", "its queries are normalised over all heads together"),
        ("transformer_encoder", "its queries come through aten.select.int, which is not understood there"),
    ],
)
def test_refuses_what_cannot_be_taken_apart(family: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match=r"MC303 weights\.prune: refused in all 2") as caught:
        pruned(captured_tiny(family).graph, tmp_path)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("later", "why"),
    [
        (entry("kv.quantize"), "its cache is quantised already"),
        (entry("attention.sparse", selector="shape", dense_tokens=0), "its heads choose their keys already"),
        (entry("attention.static", window_tokens=4, heads=[0]), "its queries come through aten.slice"),
    ],
    ids=["codes", "patterns", "split heads"],
)
def test_refuses_heads_that_another_run_has_settled(later: Any, why: str, tmp_path: Path) -> None:
    graph = captured_tiny("llama").graph
    apply(graph, [later], calibration=text(tmp_path))
    with pytest.raises(MemcompileError, match=why):
        pruned(graph, tmp_path)


def test_refuses_heads_that_something_else_reads(tmp_path: Path) -> None:
    graph = captured_tiny("llama").graph
    (first, second) = head_regions(graph)
    for node in (first.sources[1].maker.node, second.after[-1]):
        with graph.graph.inserting_after(node):
            other = graph.graph.call_function(torch.ops.aten.neg.default, (node,))
        other.meta.update(node.meta)
        output = next(n for n in graph.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], other),)  # type: ignore[misc]
    result = apply(graph, [entry("weights.prune", **HEADS)], calibration=text(tmp_path), strict=False)
    assert [refusal.reason for refusal in result.refusals] == [
        "something else reads its queries, keys or values too",
        "something else reads what its heads give",
    ]


def test_a_share_that_is_no_whole_group_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match=r"MC305 .* is 1, and at least 2 go together"):
        pruned(captured_tiny("llama").graph, tmp_path, sparsity=0.1)


PLANS: dict[str, list[Any]] = {
    "int8": [entry("kv.quantize", bits=8)],
    "windows": [entry("attention.static", window_tokens=6, sink_tokens=2), entry("kv.quantize", bits=4)],
    "evict": [entry("kv.evict", keep_tokens=20, observe_tokens=4), entry("kv.quantize", bits=8)],
    "patterns": [
        entry("attention.sparse", selector="shape", dense_tokens=0, block_tokens=32, local_tokens=8),
        entry("attention.sparse", selector="pages", dense_tokens=0, page_tokens=16, keep_tokens=32),
    ],
    "channels": [
        entry("weights.prune", granularity="channels", sparsity=0.5),
        entry("weights.quantize", bits=8, block_size=16),
    ],
}


@pytest.mark.parametrize("plan", PLANS)
def test_other_passes_compose_and_rows_equal_each_row_alone(plan: str, tmp_path: Path) -> None:
    captured = captured_tiny("llama", num_key_value_heads=4)
    silence(captured.graph, {0: [0, 1, 3]})
    # the plan's order is not the passes': heads go before anything that counts them
    apply(
        captured.graph,
        [*PLANS[plan], entry("weights.prune", **{**HEADS, "sparsity": 0.375})],
        calibration=text(tmp_path),
    )
    assert sizes(captured.graph) == [(1, 1), (4, 4)]
    session = TorchSession(build_program(captured))
    rows = rows_of(1, 40, 65)
    together = generate(session, rows)
    for index, row in enumerate(rows):
        np.testing.assert_allclose(together[:, index], generate(session, [row])[:, 0], atol=5e-5, rtol=0)


def test_decoding_with_state_equals_reading_everything(tmp_path: Path) -> None:
    captured = captured_tiny("qwen3")
    pruned(captured.graph, tmp_path, sparsity=0.25)
    (row,) = rows_of(30)
    session = TorchSession(build_program(captured))
    state = session.new_state(1)
    session.prefill(state, [row[:20]])
    steps = np.stack([session.decode(state, np.array([token]))[0] for token in row[20:]])
    with torch.no_grad():
        whole = captured.graph(torch.tensor([row]), torch.arange(30)[None])[0]
    np.testing.assert_allclose(steps, whole[0, 20:].numpy(), atol=2e-5)
    assert sorted(keys.shape[1] for keys, _ in state.caches.values()) == [1, 2]


def test_weights_on_disk_are_sliced_and_not_read(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    graph = capture(str(folder)).graph
    pruned(graph, tmp_path)
    for region in head_regions(graph):
        for product in region.products:
            weight = product.stored
            assert isinstance(weight, LazyParameter)
            assert isinstance(weight.expression, Concat)
