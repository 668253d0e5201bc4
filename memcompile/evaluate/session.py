"""The part of a session that evaluation uses: any backend that offers it can be measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class MeasuredState(Protocol):
    """What a session carries between calls."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all state buffers now."""


class MeasuredSession(Protocol):
    """The session methods that tasks call; `memcompile.runtime.load` returns one."""

    @property
    def manifest(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> Any: ...

    def prefill(self, state: Any, rows: list[list[int]]) -> Sequence[Logits]: ...

    def compress(self, state: Any) -> None: ...

    def decode(self, state: Any, tokens: NDArray[np.int64]) -> Logits: ...

    def extend(self, state: Any, tokens: list[int]) -> Logits: ...


Opener = Callable[..., Any]


def resolve_opener(reference: str) -> Opener:
    """Import the function a "module:function" reference names."""
    module, _, function = reference.partition(":")
    opener: Opener = getattr(importlib.import_module(module), function)
    return opener
