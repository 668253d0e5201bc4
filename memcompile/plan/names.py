"""Guess what somebody meant who wrote a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

ALIASES: Final = {
    "gpu": "cuda",
    "ort": "onnxruntime",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean keep_tokens?`, or everything there is."""
    names = sorted(known)
    # "gpu" is one letter from cpu and means cuda
    alias = ALIASES.get(word.lower())
    inside = [name for name in names if len(word) > 2 and (word in name or name in word)]
    close = [alias] if alias in names else inside or difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {' or '.join(map(str, close[:3]))}?"
    return f"known: {', '.join(names)}" if names else "it takes no keys"
