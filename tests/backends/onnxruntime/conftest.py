"""What tests of the onnxruntime backend share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from memcompile.program import Program
from memcompile.runtime import Session
from tests.backends.onnxruntime.build import session_of
from tests.models import captured_tiny

Plain = Callable[[str], tuple[Program, Session]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The ways to finish one traced graph run in one process."""
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and "finish" in item.callspec.params
        ):
            rest = {name: value for name, value in item.callspec.params.items() if name != "finish"}
            item.add_marker(pytest.mark.xdist_group(f"{item.originalname} {rest}"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The program and the opened artifact of a family's tiny model as it is, made once; not to be changed."""

    @functools.cache
    def made(family: str) -> tuple[Program, Session]:
        return session_of(captured_tiny(family), tmp_path_factory.mktemp(family) / "out")

    return made
