"""Sizes and shares as people write them: `24MiB`, `1.5GB`, `2%`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Final

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

BYTES_OF: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
UNIT: Final = "memcompile_unit"
_NUMBER: Final = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_SIZE: Final = re.compile(rf"\s*({_NUMBER})\s*([a-z]*)\s*", re.IGNORECASE)
_PERCENT: Final = re.compile(rf"\s*({_NUMBER})\s*%\s*", re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Read a size in bytes; `MiB` is 2**20 and `MB` is 10**6.

    Raises:
        ValueError: not a size, or not a whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[3].lower() not in BYTES_OF:
        raise _not_a("size in bytes", value, "24MiB, 24MB or 25165824")
    return round(float(match[1]) * BYTES_OF[match[3].lower()])


def parse_share(value: object) -> float:
    """Read a share: `2%` and `0.02` are the same number.

    Raises:
        ValueError: neither a finite number nor a percentage.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _not_a("share", value, "2% or 0.02")
    return float(match[1]) / 100


def _not_a(kind: str, value: object, examples: str) -> ValueError:
    # a type of its own, so that the plan can tell "not a size" from "a size out of range"
    return PydanticCustomError(
        UNIT, "{value} is not a {kind}", {"value": repr(value), "kind": kind, "examples": examples}
    )


def format_bytes(count: float) -> str:
    """Write a size the way the plan reads it: `24MiB`, `1.5KiB`, `17B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.0f}B"


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Share = Annotated[float, BeforeValidator(parse_share), Field(ge=0)]
