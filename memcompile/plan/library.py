"""The registered passes, as a plan looks them up. Loading one imports torch, so it happens late."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from memcompile.errors import MemcompileError
from memcompile.plan.entries import PassKind
from memcompile.rewrite.registry import load_pass, pass_names


class Registry:
    """`memcompile.rewrite.registry` as a plan sees it."""

    def names(self) -> Collection[str]:
        return pass_names()

    def load(self, name: str) -> PassKind:
        try:
            return cast(PassKind, load_pass(name))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("memcompile"):
                raise
            raise MemcompileError(
                "MC206",
                f"{name} needs {error.name}, which is not installed",
                fix="pip install 'memcompile[cpu]'",
            ) from error
