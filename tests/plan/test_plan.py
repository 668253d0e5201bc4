from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memcompile.errors import MemcompileError
from memcompile.plan import Plan, load_plan
from memcompile.plan.schema import Limit
from tests.plan.library import EvictConfig, FakeLibrary

Load = Callable[..., Plan]

FULL = """\
version: 1
model:   {source: model.gguf, dtype: float32}
target:  {backend: onnxruntime, device: cpu, threads: 2}
workload: {prompt_tokens: 8192, new_tokens: 256, batch: 1}
data:    {evaluation: {text: book.txt, tokens: 16384}}
passes:
  - kv.evict:    {preset: snapkv, keep_tokens: 2048, layers: "2-29", expect: 28}
  - kv.quantize: {bits: 8}
gates:
  perplexity: {max_increase: 2%}
  passkey:    {min_accuracy: 0.9}
  state_bytes: {max: 24MiB}
  decode_speedup: {min: 1.5}
"""


def test_reads_every_section(load: Load) -> None:
    plan = load(FULL)
    assert plan.model.source == "model.gguf"
    assert plan.target.threads == 2
    assert plan.workload.prompt_tokens == 8192
    assert plan.data.evaluation is not None
    assert plan.text_path(plan.data.evaluation) == Path("book.txt")
    assert [entry.name for entry in plan.passes] == ["kv.evict", "kv.quantize"]
    assert plan.gates.limits() == (
        Limit("perplexity", "max_increase", 0.02),
        Limit("passkey", "min_accuracy", 0.9),
        Limit("state_bytes", "max", 24 * 2**20),
        Limit("decode_speedup", "min", 1.5),
    )


def test_entry_holds_what_the_machinery_needs(load: Load) -> None:
    entry = load(FULL).passes[0]
    assert entry.options == EvictConfig(scorer="snapkv", keep_tokens=2048)
    assert str(entry.layers) == "2-29"
    assert entry.heads is None
    assert (entry.preset, entry.expect, entry.where) == ("snapkv", 28, "plan.yaml:7")


def test_empty_plan_is_a_plan(load: Load) -> None:
    assert load("version: 1\n").passes == ()
    assert load("").target.threads >= 1


def test_options_may_be_left_out(load: Load) -> None:
    assert load("passes:\n  - kv.quantize:\n").passes[0].options.model_dump()["bits"] == 8


def test_a_preset_fills_in_and_own_options_win(load: Load) -> None:
    plan = load("passes:\n  - kv.evict: {preset: knorm, keep_tokens: 32}\n")
    assert plan.passes[0].options == EvictConfig(scorer="knorm", keep_tokens=32)
    assert str(plan.passes[0].layers) == "2-5"


def test_an_own_option_replaces_the_presets_alternative_to_it(load: Load) -> None:
    # snapkv brings keep_fraction; keep_tokens says the same thing in another way
    options = load("passes:\n  - kv.evict: {preset: snapkv, keep_tokens: 32}\n").passes[0].options
    assert options == EvictConfig(keep_tokens=32, keep_fraction=None)


def test_resolved_is_json_and_reads_back(load: Load) -> None:
    plan = load(FULL)
    resolved = json.loads(json.dumps(plan.resolved()))
    assert resolved["passes"][0]["kv.evict"]["observe_tokens"] == 32
    assert resolved["gates"]["perplexity"] == {"max_increase": 0.02}
    again = load_plan(resolved, library=FakeLibrary())
    assert again.resolved() == plan.resolved()
    assert [e.config for e in again.passes] == [e.config for e in plan.passes]


def test_places_of_gates_are_kept_for_later(load: Load) -> None:
    assert load(FULL).where("gates", "state_bytes") == "plan.yaml:12"
    assert load(FULL).where("gates", "state_bytes", "max") == "plan.yaml:12"


def test_a_mapping_names_paths_instead_of_lines() -> None:
    with pytest.raises(MemcompileError) as caught:
        load_plan({"passes": [{"kv.quantize": {"bitz": 8}}]}, library=FakeLibrary())
    assert caught.value.message == "kv.quantize.bitz: unknown key"
    assert caught.value.fix == "did you mean bits?"


def test_texts_of_a_mapping_are_relative_to_base(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    plan = load_plan({"data": {"calibration": {"text": "a.txt"}}}, base=tmp_path, library=FakeLibrary())
    assert plan.data.calibration is not None
    assert plan.text_path(plan.data.calibration) == tmp_path / "a.txt"


def test_a_model_source_beside_the_plan_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "plan.yaml").write_text("model: {source: model.gguf}", encoding="utf-8")
    assert load_plan(tmp_path / "plan.yaml", library=FakeLibrary()).model_source() == str(
        tmp_path / "model.gguf"
    )
    (tmp_path / "plan.yaml").write_text("model: {source: 'package.module:build'}", encoding="utf-8")
    assert load_plan(tmp_path / "plan.yaml", library=FakeLibrary()).model_source() == "package.module:build"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('layers: "0-4"', 'layers: "5-9"'),
        ("layers: {every: 2}", "layers: {every: 2, from: 1}"),
        ('layers: "0"', 'layers: "!0"'),
        ("heads: [0]", "heads: [1, 2]"),
        ('layers: "model.layers.[0-4]"', 'layers: "model.layers.[5-9]"'),
    ],
)
def test_one_pass_may_come_twice_on_different_layers_or_heads(load: Load, first: str, second: str) -> None:
    text = f"passes:\n  - kv.evict: {{keep_tokens: 9, {first}}}\n  - kv.evict: {{keep_tokens: 8, {second}}}\n"
    assert len(load(text).passes) == 2
