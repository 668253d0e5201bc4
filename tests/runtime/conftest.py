"""Tiny artifacts, written once a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memcompile.runtime import load
from memcompile.runtime.session import Session
from tests.runtime.tiny_artifact import TinyModel, write_tiny

OpenTiny = Callable[..., Session]


@pytest.fixture(scope="module")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> OpenTiny:
    """Open a session on a tiny model; equal arguments share an artifact."""
    written: dict[str, Path] = {}

    def opened(model: TinyModel, **changes: Any) -> Session:
        key = repr((model, sorted(changes)))
        if key not in written:
            written[key] = write_tiny(tmp_path_factory.mktemp("tiny") / "artifact", model, **changes)
        return load(written[key], threads=1)

    return opened
