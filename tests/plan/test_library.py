from __future__ import annotations

import pytest

from memcompile.errors import MemcompileError
from memcompile.plan import library
from memcompile.plan.library import Registry


@pytest.mark.parametrize("missing", ["torch", "memcompile.passes.kv.gone"])
def test_a_pass_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def load(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(library, "load_pass", load)
    if missing.startswith("memcompile"):
        # a module of our own that is missing is our mistake, and no package mends it
        with pytest.raises(ModuleNotFoundError):
            Registry().load("kv.evict")
        return
    with pytest.raises(MemcompileError) as caught:
        Registry().load("kv.evict")
    assert caught.value.code == "MC206"
    assert caught.value.message == "kv.evict needs torch, which is not installed"
    assert caught.value.fix == "pip install 'memcompile[cpu]'"
