"""Every way a plan can be wrong: code, message, place and fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memcompile.errors import MemcompileError
from memcompile.plan import load_plan

Refuse = Callable[..., MemcompileError]

EVICT = "version: 1\npasses:\n  - kv.evict: {%s}\n"

CASES = {
    "unknown_section": ("version: 1\npases: []\n", "MC102", "pases: unknown key", 2, "did you mean passes?"),
    "unknown_key": (
        "target:\n  thread: 2\n",
        "MC102",
        "target.thread: unknown key",
        2,
        "did you mean threads?",
    ),
    "unknown_option": (
        EVICT % "keep_token: 3",
        "MC102",
        "kv.evict.keep_token: unknown key",
        3,
        "keep_tokens",
    ),
    "unknown_limit": (
        "gates:\n  kl:\n    maximum: 1\n",
        "MC102",
        "gates.kl.maximum: unknown key",
        3,
        "did you mean max?",
    ),
    "unknown_pass": (
        "passes:\n  - kv.evikt: {}\n",
        "MC105",
        "unknown pass kv.evikt",
        2,
        "did you mean kv.evict?",
    ),
    "preset_for_a_pass": (
        "passes:\n  - snapkv: {}\n",
        "MC105",
        "unknown pass snapkv",
        2,
        "snapkv is a preset: write kv.evict: {preset: snapkv}",
    ),
    "unknown_preset": (
        EVICT % "preset: snapvk",
        "MC106",
        "kv.evict: unknown preset snapvk",
        3,
        "did you mean snapkv?",
    ),
    "no_presets": (
        "passes:\n  - kv.quantize: {preset: x}\n",
        "MC106",
        "unknown preset x",
        2,
        "has no presets",
    ),
    "text_for_a_number": (
        EVICT % "keep_tokens: many",
        "MC103",
        "kv.evict.keep_tokens: a whole number is wanted, got 'many'",
        3,
        "keep_tokens is tokens kept by each head",
    ),
    "quoted_number": (
        'target:\n  threads: "2"\n',
        "MC103",
        "a whole number is wanted, got '2'",
        2,
        "threads",
    ),
    "truth_for_a_number": ("target: {threads: true}\n", "MC103", "got True", 1, "threads"),
    "list_for_a_section": ("target: [cpu]\n", "MC103", "target: a mapping of keys is wanted", 1, "backend"),
    "pass_options_are_a_list": (
        "passes:\n  - kv.evict: [1]\n",
        "MC103",
        "a mapping of options",
        2,
        "kv.evict: {}",
    ),
    "passes_are_a_mapping": (
        "passes:\n  kv.evict: {}\n",
        "MC103",
        "passes: a list is wanted",
        1,
        "- kv.quantize",
    ),
    "pass_is_a_name": (
        "passes:\n  - kv.quantize\n",
        "MC103",
        "passes[0]: one pass name",
        2,
        "- kv.quantize: {}",
    ),
    "two_passes_in_one_item": (
        "passes:\n  - kv.quantize: {}\n    kv.evict: {}\n",
        "MC103",
        "passes[0]: one pass name",
        2,
        "begin a new `- `",
    ),
    "plan_is_a_list": (
        "- kv.quantize: {}\n",
        "MC103",
        "a plan is a mapping of keys, not a list",
        1,
        "version: 1",
    ),
    "size_without_a_known_unit": (
        "gates:\n  state_bytes: {max: 24MiBs}\n",
        "MC103",
        "gates.state_bytes.max: '24MiBs' is not a size in bytes",
        2,
        "24MiB",
    ),
    "not_a_share": (
        "gates:\n  passkey: {min_accuracy: most}\n",
        "MC103",
        "gates.passkey.min_accuracy: 'most' is not a share",
        2,
        "2% or 0.02",
    ),
    "too_small": (
        "workload: {batch: 0}\n",
        "MC104",
        "workload.batch: 0 is out of range",
        1,
        "give at least 1",
    ),
    "option_too_large": (
        EVICT % "keep_fraction: 1.5",
        "MC104",
        "kv.evict.keep_fraction: 1.5 is out of range",
        3,
        "give at most 1",
    ),
    "share_above_all": ("gates: {passkey: {min_accuracy: 110%}}\n", "MC104", "out of range", 1, "at most 1"),
    "nan": ("gates: {kl: {max: .nan}}\n", "MC104", "gates.kl.max: nan is out of range", 1, "at least 0"),
    "not_a_choice": (
        "model: {dtype: float31}\n",
        "MC104",
        "model.dtype: float31 is not one of float32, float16, bfloat16",
        1,
        "float32",
    ),
    "option_not_a_choice": (
        EVICT % "scorer: snap, keep_tokens: 1",
        "MC104",
        "snap is not one of snapkv, knorm",
        3,
        "snapkv",
    ),
    "bad_layers": (EVICT % 'keep_tokens: 1, layers: "9-2"', "MC104", "kv.evict.layers", 3, '"2-9"'),
    "layers_of_no_kind": (EVICT % "layers: true", "MC103", "kv.evict.layers", 3, '"2-29"'),
    "bad_heads": (EVICT % "heads: {kv: x}", "MC104", "kv.evict.heads: 'x'", 3, "0-2"),
    "heads_of_a_pass_without": (
        "passes:\n  - kv.quantize: {heads: 0}\n",
        "MC102",
        "kv.quantize.heads: kv.quantize works on whole layers",
        2,
        "remove heads",
    ),
    "expect_nothing": (EVICT % "expect: 0", "MC104", "kv.evict.expect: 0 is out of range", 3, "at least 1"),
    "unknown_backend": (
        "target: {backend: onnx}\n",
        "MC112",
        "onnx is not one of",
        1,
        "did you mean onnxruntime?",
    ),
    "unknown_device": ("target: {device: gpu}\n", "MC112", "gpu is not one of cpu, cuda", 1, "cuda"),
    "unknown_gate": (
        "gates:\n  perplexit: {max: 9}\n",
        "MC113",
        "gates.perplexit",
        2,
        "did you mean perplexity?",
    ),
    "gate_without_limit": ("gates:\n  kl: {}\n", "MC113", "gates.kl: the gate has no limit", 2, "give max"),
    "gate_with_empty_limit": (
        "gates:\n  kl: {max: }\n",
        "MC113",
        "gates.kl: the gate has no limit",
        2,
        "max",
    ),
    "newer_version": ("version: 2\n", "MC111", "version 2, this memcompile knows 1", 1, "newer memcompile"),
    "older_version": ("version: 0\n", "MC111", "version 0", 1, "write version: 1"),
    "version_of_no_kind": (
        "version: one\n",
        "MC103",
        "version: 'one' is not a number",
        1,
        "write version: 1",
    ),
    "missing_text_key": (
        "data:\n  evaluation: {tokens: 9}\n",
        "MC107",
        "data.evaluation.text: the key is missing",
        2,
        "add text",
    ),
    "missing_text": (
        "data:\n  evaluation:\n    text: bok.txt\n",
        "MC121",
        "data.evaluation.text: bok.txt does not exist",
        3,
        "give a text",
    ),
    "text_of_another_kind": (
        "data: {calibration: {text: book.pdf}}\n",
        "MC121",
        "book.pdf is not one of",
        1,
        "plain",
    ),
    "gate_without_text": (
        "version: 1\ngates:\n  perplexity: {max_increase: 2%}\n",
        "MC107",
        "gates.perplexity: there is no evaluation text",
        3,
        "data: {evaluation",
    ),
    "both_of_two_spellings": (
        EVICT % "keep_tokens: 9,\n    keep_fraction: 0.5",
        "MC109",
        "kv.evict: keep_tokens (9) and keep_fraction (0.5) contradict each other",
        4,
        "keep one of keep_tokens, keep_fraction",
    ),
    "neither_of_two_spellings": (
        EVICT % "scorer: knorm",
        "MC107",
        "kv.evict: one of keep_tokens and keep_fraction is needed",
        3,
        "add keep_tokens, or a preset",
    ),
    "options_against_each_other": (
        "passes:\n  - kv.quantize: {low: 3, high: 2}\n",
        "MC104",
        "kv.quantize: low (3) is above high (2)",
        2,
        "",
    ),
    "bits_twice": (
        "passes:\n  - kv.quantize: {bits: 8}\n  - kv.quantize: {bits: 4}\n",
        "MC109",
        "kv.quantize is applied twice to all layers, also at plan.yaml:2",
        3,
        "join the two lines",
    ),
    "same_layers_twice": (
        'passes:\n  - kv.evict: {keep_tokens: 1, layers: "0-5"}\n'
        "  - kv.evict: {keep_tokens: 1, layers: [5, 7]}\n",
        "MC109",
        "kv.evict is applied twice to layer 5, also at plan.yaml:2",
        3,
        "layers that do not overlap",
    ),
    "same_heads_twice": (
        'passes:\n  - kv.evict: {keep_tokens: 1, heads: "0-2"}\n  - kv.evict: {keep_tokens: 1, heads: [2]}\n',
        "MC109",
        "kv.evict is applied twice",
        3,
        "join",
    ),
    "not_yaml": (
        "version: 1\ntarget: {threads: 2\npasses: []\n",
        "MC101",
        "",
        3,
        "indentation, colons and braces",
    ),
    "tab": ("target:\n\tthreads: 2\n", "MC101", "", 2, "indentation"),
    "duplicate_key": ("target:\n  threads: 2\n  threads: 3\n", "MC101", "duplicate key", 3, "remove one"),
    "imports_of_no_kind": (
        "version: 1\nimports: base.yaml\n",
        "MC103",
        "imports: a list of files",
        2,
        "imports: [",
    ),
    "import_missing": (
        "imports:\n  - bas.yaml\n",
        "MC114",
        "imports[0]: bas.yaml does not exist",
        2,
        "plan.yaml",
    ),
    "import_absolute": (
        "imports: [/etc/plan.yaml]\n",
        "MC114",
        "/etc/plan.yaml is an absolute path",
        1,
        "relative",
    ),
    "import_of_itself": (
        "imports: [plan.yaml]\n",
        "MC114",
        "plan.yaml imports itself",
        1,
        "remove one import",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_where_and_how_to_mend_it(refuse: Refuse, case: str) -> None:
    text, code, message, line, fix = CASES[case]
    error = refuse(text)
    assert error.code == code, error
    assert message in error.message
    assert error.where == f"plan.yaml:{line}"
    assert fix in (error.fix or "")


OVERRIDES = {
    "no_value": ("target.threads", "'target.threads' is not KEY=VALUE", "--set target.threads=1"),
    "unknown_section": ("tarket.threads=1", "a plan has no key tarket", "did you mean target?"),
    "unknown_key": ("target.thread=1", "target.thread: unknown key", "did you mean threads?"),
    "unknown_option": ("passes.0.keep=1", "kv.evict.keep: unknown key", "keep_tokens"),
    "section": ("target=1", "target is a section, not a value", "backend, device, threads"),
    "below_a_value": ("target.threads.x=1", "target.threads is the value 2", "name the value itself"),
    "below_the_version": ("version.x=1", "version is a number", "version=1"),
    "pass_beyond_the_last": ("passes.2.bits=8", "the plan has no pass 2", "0 kv.evict, 1 kv.quantize"),
    "pass_not_in_the_plan": ("passes.kv.evikt.bits=8", "the plan has no pass kv.evikt", "0 kv.evict"),
    "pass_without_key": ("passes.1=8", "no key of kv.quantize is named", "passes.1.KEY=VALUE"),
    "named_pass_without_key": ("passes.kv.evict=8", "no key of kv.evict is named", "passes.0.KEY=VALUE"),
    "not_yaml": ("target.threads={", "the value '{' is not YAML", "quote"),
    "list_item_missing": ("passes.0.pools.4=1", "has no item 4", "it has 1 items"),
}
PLAN = "target: {threads: 2}\npasses:\n  - kv.evict: {keep_tokens: 5, pools: [7]}\n  - kv.quantize: {}\n"


@pytest.mark.parametrize("case", OVERRIDES)
def test_says_what_is_wrong_with_an_override(refuse: Refuse, case: str) -> None:
    override, message, fix = OVERRIDES[case]
    error = refuse(PLAN, override)
    assert error.code == "MC108", error
    assert message in error.message
    assert error.where == f"--set {override}"
    assert fix in (error.fix or "")


@pytest.mark.parametrize(
    ("override", "code"),
    [("target.threads=0", "MC104"), ("target.threads=two", "MC103"), ("version=2", "MC111")],
)
def test_a_bad_value_keeps_its_code_and_names_the_override(refuse: Refuse, override: str, code: str) -> None:
    error = refuse(PLAN, override)
    assert (error.code, error.where) == (code, f"--set {override}")


def test_an_override_by_name_needs_the_name_to_be_unique(refuse: Refuse) -> None:
    text = 'passes:\n  - kv.evict: {layers: "0"}\n  - kv.evict: {layers: "1"}\n'
    error = refuse(text, "passes.kv.evict.keep_tokens=3")
    assert error.code == "MC108"
    assert "2 times" in error.message
    assert error.fix == "say which one: passes.0 or passes.1"


def test_a_missing_plan_names_the_plans_beside_it(tmp_path: Path) -> None:
    (tmp_path / "snapkv.yaml").touch()
    with pytest.raises(MemcompileError) as caught:
        load_plan(tmp_path / "plan.yaml")
    assert caught.value.code == "MC110"
    assert caught.value.where == str(tmp_path / "plan.yaml")
    assert "snapkv.yaml" in str(caught.value.fix)


def test_a_folder_is_not_a_plan(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC110"):
        load_plan(tmp_path)


def test_a_plan_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MemcompileError, match="MC101"):
        load_plan(tmp_path / "plan.yaml")


def test_a_python_plan_cannot_import() -> None:
    with pytest.raises(MemcompileError, match="MC114"):
        load_plan({"imports": ["base.yaml"]})
