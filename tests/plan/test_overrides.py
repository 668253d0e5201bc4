from __future__ import annotations

from collections.abc import Callable

import pytest

from memcompile.plan import Plan

Load = Callable[..., Plan]
PLAN = "target: {threads: 2}\npasses:\n  - kv.quantize: {}\n  - kv.evict: {keep_tokens: 5, pools: [7, 5]}\n"


def test_changes_a_value(load: Load) -> None:
    assert load(PLAN, "target.threads=1").target.threads == 1


def test_creates_sections_that_the_plan_leaves_out(load: Load) -> None:
    plan = load(PLAN, "data.evaluation.text=book.txt", "gates.perplexity.max_increase=5%")
    assert plan.data.evaluation is not None
    assert plan.gates.perplexity is not None
    assert plan.gates.perplexity.max_increase == pytest.approx(0.05, rel=1e-12)


@pytest.mark.parametrize("path", ["passes.1.keep_tokens", "passes.kv.evict.keep_tokens"])
def test_names_a_pass_by_index_or_by_name(load: Load, path: str) -> None:
    assert load(PLAN, f"{path}=1024").passes[1].options.model_dump()["keep_tokens"] == 1024


def test_gives_options_to_a_pass_without_any(load: Load) -> None:
    assert load(PLAN, "passes.kv.quantize.bits=4").passes[0].options.model_dump()["bits"] == 4


def test_values_are_typed_as_in_yaml(load: Load) -> None:
    plan = load(
        PLAN,
        "passes.1.keep_tokens=null",
        "passes.1.keep_fraction=0.5",
        "passes.1.layers=[0, 2]",
        "passes.1.pools.1=9",
    )
    options = plan.passes[1].options.model_dump()
    assert (options["keep_tokens"], options["keep_fraction"], options["pools"]) == (None, 0.5, (7, 9))
    assert str(plan.passes[1].layers) == "[0, 2]"


def test_the_last_one_wins(load: Load) -> None:
    assert load(PLAN, "target.threads=1", "target.threads=3").target.threads == 3


def test_a_value_may_hold_an_equals_sign(load: Load) -> None:
    assert load(PLAN, "model.source=a=b").model.source == "a=b"
