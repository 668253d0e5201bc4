"""Building the kernel library."""

from __future__ import annotations

import pytest

from memcompile.kernels.build import BuildError, build, library_path


def test_the_users_flags_make_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXXFLAGS", raising=False)
    plain = library_path()
    monkeypatch.setenv("CXXFLAGS", "-O1 -g")
    assert library_path() != plain


def test_flags_that_the_compiler_does_not_know_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-fno-such-flag")
    with pytest.raises(BuildError, match="no-such-flag"):
        build()
