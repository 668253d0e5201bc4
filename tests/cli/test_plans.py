"""`plan init` and `plan check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memcompile import pipeline
from memcompile.cli.starter import GOALS, starter_plan
from memcompile.plan import load_plan
from tests.cli.conftest import Cli

TinyFolder = Callable[[str], Path]
PlanFile = Callable[[str], Path]


def inspected(masks: list[str], **more: Any) -> dict[str, Any]:
    regions = [{"mask": mask, "layer": layer} for layer, mask in enumerate(masks)]
    return {"model": "m", "parameters": 1000, "regions": regions, "refusals": [], **more}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize(
    "masks", [["causal"] * 3, ["sliding_window", "causal"] * 2, ["sliding_window"], ["none"], []]
)
@pytest.mark.parametrize("texts", [True, False])
def test_what_init_writes_is_a_valid_plan(tmp_path: Path, goal: str, masks: list[str], texts: bool) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words", encoding="utf-8")
    given = {"text": tmp_path / "a.txt", "calibration_text": tmp_path / "b.txt"} if texts else {}
    written = starter_plan(inspected(masks), goal, source="some.module:build", folder=tmp_path, **given)
    (tmp_path / "plan.yaml").write_text(written, encoding="utf-8")
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.model.source == "some.module:build"
    assert bool(plan.gates.limits()) == (
        texts and any(mask in ("causal", "sliding_window") for mask in masks)
    )
    assert written.count("#") >= 3
    if "causal" in masks and goal == "memory":
        assert plan.passes[0].name == "kv.evict"


def test_init_evicts_only_where_the_model_has_no_window(tmp_path: Path) -> None:
    written = starter_plan(inspected(["sliding_window", "causal"]), "memory", source="m:f", folder=tmp_path)
    (tmp_path / "plan.yaml").write_text(written, encoding="utf-8")
    assert str(load_plan(tmp_path / "plan.yaml").passes[0].layers) == "[1]"


def test_init_prints_or_writes_and_never_overwrites(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "inspect", lambda *a, **k: inspected(["causal"]))
    answer = cli("plan", "init", "m:f", "--goal", "speed")
    assert answer.out.startswith("# speed: ")
    path = tmp_path / "folder" / "plan.yaml"
    assert cli("plan", "init", "m:f", "-o", path).exit_code == 0
    assert load_plan(path).passes[0].name == "kv.evict"
    again = cli("plan", "init", "m:f", "-o", path, "--json")
    assert (again.exit_code, again.json["error"]["code"]) == (2, "MC120")
    assert cli("plan", "init", "m:f", "-o", path, "--force", "--json").json["goal"] == "memory"


def test_init_refuses_a_text_that_is_not_there(cli: Cli) -> None:
    answer = cli("plan", "init", "m:f", "--text", "missing.txt", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "MC121")


def test_init_names_the_model_relative_to_the_plan(cli: Cli, tmp_path: Path, tiny_folder: TinyFolder) -> None:
    path = tmp_path / "plan.yaml"
    assert cli("plan", "init", tiny_folder("llama"), "-o", path).exit_code == 0
    source = load_plan(path).model_source()
    assert source is not None
    assert Path(source).resolve() == tiny_folder("llama").resolve()


def test_check_resolves_without_a_model(cli: Cli, plan_file: PlanFile) -> None:
    plan = plan_file("passes:\n  - kv.evict: {preset: snapkv, keep_tokens: 64}\n")
    answer = cli("plan", "check", plan, "--set", "passes.0.keep_tokens=32", "--json")
    assert answer.exit_code == 0
    assert answer.json["model"] is None
    options = answer.json["plan"]["passes"][0]["kv.evict"]
    assert (options["keep_tokens"], options["observe_tokens"], options["pool_kernel"]) == (32, 32, 7)
    shown = cli("plan", "check", plan).out
    assert "keep_tokens: 64" in shown
    assert "no model is named" in shown


def test_check_predicts_regions_and_state_bytes(
    cli: Cli, plan_file: PlanFile, tiny_folder: TinyFolder
) -> None:
    plan = plan_file(
        "workload: {prompt_tokens: 112, new_tokens: 16, batch: 2}\n"
        "passes:\n"
        "  - attention.static: {window_tokens: 28, sink_tokens: 4, layers: 0, expect: 1}\n"
        "  - kv.evict: {preset: knorm, keep_tokens: 48, layers: 1, expect: 1}\n"
        "  - kv.quantize: {bits: 8}\n"
    )
    answer = cli("plan", "check", plan, "--model", tiny_folder("llama"), "--json")
    assert answer.exit_code == 0, answer.err
    assert [entry["matched"] for entry in answer.json["passes"]] == [["0"], ["1"], ["0", "1"]]
    # two layers, keys and values, batch 2, 2 heads of 16 channels; float32 before, a byte after
    assert answer.json["state_bytes"] == {
        "original": 2 * 2 * 2 * 2 * 16 * 128 * 4,
        "rewritten": 2 * 2 * 2 * 16 * ((28 + 4) + (48 + 16)),
    }
    assert "predicted state" in cli("plan", "check", plan, "--model", tiny_folder("llama")).out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("keep_tokens: 8, layers: 7", "MC301"),
        ("keep_tokens: 8, expect: 3", "MC302"),
        ("keep_tokens: 900", "MC305"),
    ],
)
def test_check_ends_as_optimize_would(
    cli: Cli, plan_file: PlanFile, tiny_folder: TinyFolder, options: str, code: str
) -> None:
    plan = plan_file(
        f"workload: {{prompt_tokens: 64}}\npasses:\n  - kv.evict: {{preset: knorm, {options}}}\n"
    )
    answer = cli("plan", "check", plan, "--model", tiny_folder("llama"), "--json")
    assert answer.exit_code == 4
    assert answer.json["error"]["code"] == code
    assert answer.json["plan"]["version"] == 1
    assert code in answer.err


def test_check_says_when_every_region_is_refused(
    cli: Cli, plan_file: PlanFile, tiny_folder: TinyFolder
) -> None:
    plan = plan_file("passes:\n  - kv.evict: {preset: knorm, keep_tokens: 8}\n")
    answer = cli("plan", "check", plan, "--model", tiny_folder("bert"), "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (4, "MC303")


def test_check_places_a_mistake(cli: Cli, plan_file: PlanFile) -> None:
    plan = plan_file("version: 1\npasses:\n  - kv.evict: {keep_token: 3}\n")
    answer = cli("plan", "check", plan)
    assert answer.exit_code == 2
    assert answer.err == (
        f"MC102 kv.evict.keep_token: unknown key\n  where: {plan}:3\n  fix:   did you mean keep_tokens?\n"
    )
