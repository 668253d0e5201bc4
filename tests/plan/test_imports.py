from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memcompile.errors import MemcompileError
from memcompile.plan import Plan

Load = Callable[..., Plan]


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    Path(path).write_text(text, encoding="utf-8")


def test_own_keys_win_and_passes_follow_the_imported_ones(load: Load) -> None:
    write("base.yaml", "target: {threads: 1, device: cpu}\npasses:\n  - kv.evict: {keep_tokens: 5}\n")
    plan = load("imports: [base.yaml]\ntarget: {threads: 3}\npasses:\n  - kv.quantize: {}\n")
    assert (plan.target.threads, plan.target.device) == (3, "cpu")
    assert [(entry.name, entry.where) for entry in plan.passes] == [
        ("kv.evict", "base.yaml:3"),
        ("kv.quantize", "plan.yaml:4"),
    ]


def test_an_error_in_a_fragment_is_placed_there(load: Load) -> None:
    write("shared/gates.yaml", "gates:\n  kl: {maxi: 1}\n")
    with pytest.raises(MemcompileError) as caught:
        load("imports: [shared/gates.yaml]\n")
    assert caught.value.where == "shared/gates.yaml:2"


def test_texts_of_a_fragment_are_relative_to_it(load: Load) -> None:
    write("shared/texts/book.txt", "words")
    write("shared/data.yaml", "data: {evaluation: {text: texts/book.txt}}")
    plan = load("imports: [shared/data.yaml]\n")
    assert plan.data.evaluation is not None
    assert plan.data.evaluation.text == "shared/texts/book.txt"


def test_a_fragment_may_import_and_is_merged_once(load: Load) -> None:
    write("base.yaml", "passes:\n  - kv.quantize: {}\n")
    write("a.yaml", "imports: [base.yaml]\nworkload: {batch: 2}\n")
    write("b.yaml", "imports: [base.yaml]\nworkload: {batch: 3}\n")
    plan = load("imports: [a.yaml, b.yaml]\n")
    assert len(plan.passes) == 1
    assert plan.workload.batch == 3


def test_a_cycle_is_refused_where_it_closes(load: Load) -> None:
    write("a.yaml", "imports:\n  - b.yaml\n")
    write("b.yaml", "version: 1\nimports:\n  - a.yaml\n")
    with pytest.raises(MemcompileError) as caught:
        load("imports: [a.yaml]\n")
    assert (caught.value.code, caught.value.where) == ("MC114", "b.yaml:3")
    assert caught.value.message == "imports[0]: a.yaml imports itself, through b.yaml"


def test_anchors_and_merge_keys_of_yaml_work(load: Load) -> None:
    plan = load(
        "passes:\n  - kv.evict: &keep {keep_tokens: 5, layers: '0-3'}\n"
        "  - kv.evict:\n      <<: *keep\n      layers: '4-7'\n"
    )
    assert [entry.options.model_dump()["keep_tokens"] for entry in plan.passes] == [5, 5]
