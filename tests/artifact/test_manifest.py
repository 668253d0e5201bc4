"""The manifest: what is written is what is read, and everything wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memcompile.artifact import Manifest, parse_manifest
from memcompile.errors import MemcompileError
from tests.artifact.sample import sample_manifest


def test_what_is_written_is_what_is_read() -> None:
    manifest = sample_manifest()
    assert parse_manifest(manifest.as_json()) == manifest


def test_format_and_version_stand_first() -> None:
    assert list(json.loads(sample_manifest().as_json()))[:2] == ["format", "version"]


def changed(path: str, value: Any) -> str:
    data = sample_manifest().as_dict()
    place: Any = json.loads(json.dumps(data))
    whole = place
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    for part in parents:
        place = place[part]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return json.dumps(whole)


WRONG = {
    "unknown key": ("model/vocab_sise", 5, "model.vocab_sise: unknown key; did you mean vocab_size?"),
    "missing key": ("model/family", KeyError, "model.family: missing"),
    "wrong type": ("states/0/kv_heads", "3", "states[0].kv_heads: int is needed, got a string"),
    "a boolean for a size": ("states/0/kv_heads", True, "states[0].kv_heads: int is needed, got a boolean"),
    "a list for an object": ("model", [], "model: an object is needed, got a list"),
    "an object for a list": ("states", {}, "states: a list is needed, got an object"),
    "null": ("threads", None, "threads: int is needed, got null"),
    "dim": ("functions/step/inputs/0/dims", ["B", 1.5], "dims[1]: one of int, str is needed, got float 1.5"),
    "negative dim": ("functions/step/inputs/0/dims", [-1], "dim is -1, outside 0..4294967296"),
    "dtype": ("functions/step/inputs/0/dtype", "object", "dtype 'object' is not one of"),
    "huge heads": ("states/0/kv_heads", 10**12, "kv_heads is 1000000000000, outside 1..1048576"),
    "huge file": ("files", {"a": {"sha256": "0" * 64, "bytes": 10**30}}, "files.a.bytes is 1" + "0" * 30),
    "negative file": ("files", {"a": {"sha256": "0" * 64, "bytes": -1}}, "files.a.bytes is -1"),
    "digest": ("files", {"a": {"sha256": "XYZ", "bytes": 1}}, "files.a.sha256 is not a sha256 digest"),
    "chunk": ("prefill/chunk_tokens", 0, "prefill.chunk_tokens is 0, outside 1.."),
    "group": ("states/0/group", "fall", "states.0.group: there is no group 'fall'"),
    "input": ("states/0/key_in", "past", "states.0.key_in: step has no input 'past'"),
    "output": ("states/0/key_out", "now", "states.0.key_out: step has no output 'now'"),
    "bits": ("states/0/bits", 3, "states.0.bits is 3, not 0, 8 or 4"),
    "stored dtype": ("states/0/dtype", "int8", "states.0.dtype is 'int8'; with bits 0 it is one of"),
    "kind": ("groups/0/kind", "ring", "groups.full.kind is 'ring', not one of"),
    "group input": ("groups/0/input", "mask", "groups.full.input: step has no input 'mask'"),
    "a window without positions": ("groups/0/window", 5, "a linear group sees every slot, but window is 5"),
    "a stride without a block": ("groups/0/stride", 5, "stride is 5 but block is 0"),
    "no function": ("functions", {}, "functions are []: neither step nor forward is among them"),
    "eviction": (
        "groups/0/evict",
        {"observe_tokens": 2},
        "give exactly one of keep_tokens and keep_fraction",
    ),
    "format": ("format", "zip", "format is 'zip', not 'memcompile-artifact'"),
    "version of another type": ("version", "1", "version is '1', not a positive whole number"),
    "version zero": ("version", 0, "version is 0, not a positive whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_what_is_wrong_and_names_it(name: str) -> None:
    path, value, message = WRONG[name]
    with pytest.raises(MemcompileError) as caught:
        parse_manifest(changed(path, value), "out/manifest.json")
    assert caught.value.code == "MC505"
    assert message in caught.value.message
    assert caught.value.where == "out/manifest.json"
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "a list, not an object"),
        ('{"format": "a", "format": "b"}', "the key 'format' stands twice"),
        ('{"threads": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_refuses_text_that_is_not_a_manifest(text: str, message: str) -> None:
    with pytest.raises(MemcompileError) as caught:
        parse_manifest(text)
    assert caught.value.code == "MC505"
    assert message in caught.value.message


def test_free_sections_may_not_be_nested_without_end() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"deeper": deep}
    with pytest.raises(
        MemcompileError, match=r"MC505 the manifest is not valid: plan.a: nested more than 64 deep"
    ):
        parse_manifest(changed("plan", {"a": deep}))


def test_a_newer_version_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(MemcompileError) as caught:
        parse_manifest('{"format": "memcompile-artifact", "version": 2, "something": "new"}')
    assert caught.value.code == "MC502"
    assert "format version 2, this memcompile reads up to 1" in caught.value.message
    assert "upgrade memcompile" in str(caught.value.fix)


def test_a_value_that_json_cannot_hold_is_refused_when_writing() -> None:
    with pytest.raises(MemcompileError, match="MC509 the manifest holds a value that JSON cannot"):
        Manifest("onnxruntime", sample_manifest().model, {}, plan={"limit": float("nan")}).as_json()
