"""The database keeps what was measured, and what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from memcompile.errors import MemcompileError
from memcompile.tuning import Database, Key, Record, default_database
from memcompile.tuning.timing import Gain
from tests.tuning.machines import TWO

OTHER = TWO.candidates({})[1]
KEY = Key(
    "onnxruntime",
    "toy",
    {"heads": 4},
    "float32",
    {"cpu": "C", "cores": 2, "isa": "avx2", "threads": 1},
    {"k": "1"},
)
RECORD = Record(
    KEY, TWO.default, OTHER, Gain(1.5, 1.4, 1.3, 1.6), {TWO.default: (0.3, 0.31), OTHER: (0.2,)},
    {TWO.default: 1.0, OTHER: 0.6667},
    {TWO.candidates({})[2]: "its output differs"}, 7, True, "2026-01-01T00:00:00+00:00",
)  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    database = Database.at(tmp_path / "new" / "tuning.json")
    assert database.records() == {}
    database.store(RECORD)
    assert Database.at(database.path).find(KEY) == RECORD
    # nothing half written stays behind
    assert {p.name for p in database.path.parent.iterdir()} <= {"tuning.json", ".tuning.json.lock"}


@pytest.mark.parametrize(
    "changed",
    [
        {"sizes": {"heads": 8}},
        {"dtype": "bfloat16"},
        {"versions": {"k": "2"}},
        {"device": {**KEY.device, "threads": 2}},
        {"backend": "torch"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_machine_size_or_version_is_another_measurement(
    changed: Mapping[str, object], tmp_path: Path
) -> None:
    database = Database.at(tmp_path / "tuning.json")
    database.store(RECORD)
    key = replace(KEY, **changed)  # type: ignore[arg-type]
    assert database.find(key) is None
    database.store(replace(RECORD, key=key))
    database.store(replace(RECORD, winner=TWO.default))
    assert len(database.records()) == 2
    assert database.find(KEY) == replace(RECORD, winner=TWO.default)


def test_clearing_forgets_everything(tmp_path: Path) -> None:
    database = Database.at(tmp_path / "tuning.json")
    assert database.clear() == 0
    database.store(RECORD)
    assert database.clear() == 1
    assert not database.path.exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": "other"}', '{"format": "memcompile-tuning", "version": 2, "records": []}', "cut"],
)
def test_what_is_no_database_is_an_error_and_is_left_alone(text: str, tmp_path: Path) -> None:
    database = Database.at(tmp_path / "tuning.json")
    database.store(RECORD)
    content = database.path.read_text(encoding="utf-8")[:-40] if text == "cut" else text
    database.path.write_text(content, encoding="utf-8")
    for use in (database.records, database.clear, lambda: database.store(RECORD)):
        with pytest.raises(MemcompileError, match="MC122 the tuning database cannot be used") as caught:
            use()
        assert caught.value.where == str(database.path)
        assert "--database" in str(caught.value.fix)
    assert database.path.read_text(encoding="utf-8") == content


def test_a_record_without_its_times_is_not_believed(tmp_path: Path) -> None:
    database = Database.at(tmp_path / "tuning.json")
    database.store(RECORD)
    document = json.loads(database.path.read_text(encoding="utf-8"))
    document["records"][0]["candidates"].pop()
    database.path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(MemcompileError, match=r"MC122.*no times"):
        database.records()


def test_the_users_own_database_is_in_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path))
    assert default_database() == tmp_path / "tuning.json"
