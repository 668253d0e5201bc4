"""What is proven about who may see whom. A proof is a type, not a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Causal:
    """Token i sees tokens 0..i."""

    kind: ClassVar[str] = "causal"


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Token i sees the last `window_tokens` tokens up to itself."""

    window_tokens: int
    kind: ClassVar[str] = "sliding_window"


@dataclass(frozen=True, slots=True)
class Padding:
    """Every token sees every token that is not padding."""

    kind: ClassVar[str] = "padding"


@dataclass(frozen=True, slots=True)
class Unmasked:
    """Every token sees every token."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, slots=True)
class Runtime:
    """The mask is computed from data; nothing is proven."""

    kind: ClassVar[str] = "runtime"


Mask = Causal | SlidingWindow | Padding | Unmasked | Runtime
