from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memcompile.errors import MemcompileError
from memcompile.plan import Plan, load_plan
from tests.plan.library import FakeLibrary

Load = Callable[..., Plan]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write a plan.yaml, with a text beside it, and load it."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was a dark and stormy night.", encoding="utf-8")

    def write_and_load(text: str, *overrides: str) -> Plan:
        Path("plan.yaml").write_text(text, encoding="utf-8")
        return load_plan("plan.yaml", overrides, library=FakeLibrary())

    return write_and_load


@pytest.fixture
def refuse(load: Load) -> Callable[..., MemcompileError]:
    """The error that loading a plan ends with."""

    def load_and_fail(text: str, *overrides: str) -> MemcompileError:
        with pytest.raises(MemcompileError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        assert caught.value.fix
        return caught.value

    return load_and_fail
