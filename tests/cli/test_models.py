"""`inspect` and `explain` on real (tiny) models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

TinyFolder = Callable[[str], Path]
PlanFile = Callable[[str], Path]
WORKLOAD = "workload: {prompt_tokens: 64, new_tokens: 8}\n"


def test_inspect_prints_the_documented_json(cli: Cli, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("llama")
    answer = cli("inspect", folder, "--json")
    assert answer.exit_code == 0
    found = answer.json
    assert {"schema", "model", "parameters", "regions", "refusals"} <= set(found)
    assert (found["schema"], found["model"], found["refusals"]) == (1, str(folder), [])
    assert found["regions"][1] == {
        "kind": "attention",
        "layer": 1,
        "path": "model.layers.1.self_attn",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "mask": "causal",
        "window_tokens": None,
    }


def test_inspect_folds_layers_that_are_alike(cli: Cli, tiny_folder: TinyFolder) -> None:
    answer = cli("inspect", tiny_folder("llama"))
    assert answer.exit_code == 0
    assert "2 attention regions" in answer.out
    assert "0-1" in answer.out


@pytest.mark.parametrize(("source", "code"), [("missing", "MC201"), ("book.txt", "MC202")])
def test_inspect_refuses_what_is_no_model(
    cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch, source: str, code: str
) -> None:
    monkeypatch.chdir(text.parent)
    answer = cli("inspect", source, "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (3, code)


def test_explain_gives_each_refusal_its_reason(
    cli: Cli, tiny_folder: TinyFolder, plan_file: PlanFile
) -> None:
    # two passes may not both bound one cache: the second is refused where the first applies
    plan = plan_file(
        WORKLOAD + "passes:\n"
        "  - attention.static: {window_tokens: 16, layers: 0}\n"
        "  - kv.evict: {preset: knorm, keep_tokens: 16}\n"
    )
    answer = cli("explain", tiny_folder("llama"), "--plan", plan, "--json")
    assert answer.exit_code == 0
    static, evict = answer.json["passes"]
    assert (static["pass"], static["matched"], static["refusals"]) == ("attention.static", ["0"], [])
    assert (evict["pass"], evict["matched"]) == ("kv.evict", ["1"])
    (refusal,) = evict["refusals"]
    assert "layer 0" in refusal["where"]
    assert "window" in refusal["reason"]
    shown = cli("explain", tiny_folder("llama"), "--plan", plan).out
    assert refusal["reason"].split(",")[0] in " ".join(shown.split())


def test_explain_names_the_nearest_for_a_selector_that_matches_nothing(
    cli: Cli, tiny_folder: TinyFolder, plan_file: PlanFile
) -> None:
    plan = plan_file(
        WORKLOAD + "passes:\n"
        "  - kv.evict: {preset: knorm, keep_tokens: 16, layers: 'model.layer.1.*'}\n"
        "  - kv.quantize: {bits: 8}\n"
    )
    answer = cli("explain", tiny_folder("llama"), "--plan", plan, "--json")
    evict, quantize = answer.json["passes"]
    assert evict["matched"] == []
    assert "model.layers.1" in evict["nearest"]
    assert evict["problem"]["code"] == "MC301"
    # the others are explained all the same
    assert quantize["matched"] == ["0", "1"]
    assert "model.layers.1" in cli("explain", tiny_folder("llama"), "--plan", plan).out


def test_explain_graph_shows_the_order_and_its_reasons(cli: Cli, plan_file: PlanFile) -> None:
    plan = plan_file("passes:\n  - kv.quantize: {bits: 8}\n  - kv.evict: {preset: knorm, keep_tokens: 16}\n")
    order = cli("explain", "--plan", plan, "--graph", "--json").json
    assert [entry["pass"] for entry in order["passes"]] == ["kv.evict", "kv.quantize"]
    (edge,) = order["edges"]
    assert (edge["before"], edge["after"]) == (0, 1)
    assert edge["reason"]
    assert "after 1. kv.evict" in cli("explain", "--plan", plan, "--graph").out


def test_explain_without_any_model_says_so(cli: Cli, plan_file: PlanFile) -> None:
    answer = cli("explain", "--plan", plan_file("passes: []\n"), "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "MC107")
