"""The calls that the kernels are checked on, as plain data: nothing here imports triton.

Shapes: B batch, T query tokens, S key slots, H query heads, G key/value heads, D width of keys, DV of values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EDGES = (1, 63, 64, 65, 200)
WINDOWS: dict[str, dict[str, Any]] = {
    "window": {"window": 40},
    "sinks": {"window": 40, "sinks": 4},
    "stride": {"window": 40, "sinks": 4, "block": 16, "stride": 3},
    "softcap": {"softcap": 5.0},
    "window and softcap": {"window": 30, "softcap": 2.0},
    "padding": {"causal": False},
    "two-sided window": {"causal": False, "window": 20},
    "extreme logits": {"scale": 1e4},
}


@dataclass(frozen=True)
class Case:
    """One call. `keys` counts the slots, of which the queries are the last `tokens`.

    `ragged`: the second row lacks its first and last slots, which hold NaN. `shuffled`: cached slots are in
    no order.
    `skipped`: per head, about this share of the blocks of 64 is left out by a block mask, and holds NaN where
    no head reads it.
    `chosen`: attend over this many slots, other ones for each key/value head. `mask`: a run-time mask.
    """

    kernel: str
    tokens: int
    keys: int
    heads: int = 2
    groups: int = 1
    width: int = 32
    v_width: int = 0
    dtype: str = "float32"
    bits: int = 0
    batch: int = 2
    ragged: bool = True
    shuffled: bool = False
    skipped: float = 0.0
    chosen: int = 0
    splits: int = 0
    mask: str = ""
    rule: dict[str, Any] = field(default_factory=dict)


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    cases = {f"prefill {t} tokens": Case("prefill", t, t) for t in EDGES}
    cases |= {f"prefill 65 tokens after {past}": Case("prefill", 65, 65 + past) for past in (1, 64, 135)}
    cases |= {f"decode {s} keys": Case("decode", 1, s) for s in (*EDGES, 1000)}
    cases |= {f"decode 3 tokens, {n} splits": Case("decode", 3, 200, splits=n) for n in (1, 2, 7)}
    for heads, groups, name in ((3, 3, "mha"), (6, 2, "gqa"), (4, 1, "mqa")):
        for dtype in ("float32", "float16", "bfloat16"):
            cases[f"prefill {name} {dtype}"] = Case("prefill", 65, 65, heads, groups, dtype=dtype)
            cases[f"decode {name} {dtype}"] = Case("decode", 2, 65, heads, groups, dtype=dtype)
    for width, v_width in ((64, 64), (80, 80), (96, 48), (128, 128), (256, 256)):
        for kernel, tokens in (("prefill", 65), ("decode", 1)):
            for dtype in ("float32", "float16"):
                name = f"{kernel} widths {width} and {v_width}, {dtype}"
                cases[name] = Case(kernel, tokens, 100, width=width, v_width=v_width, dtype=dtype)
    for name, rule in WINDOWS.items():
        cases[f"prefill {name}"] = Case("prefill", 150, 200, rule=rule)
        cases[f"decode {name}"] = Case("decode", 2, 200, rule=rule)
    for kernel, tokens in (("prefill", 40), ("decode", 2)):
        cases[f"{kernel} shuffled"] = Case(kernel, tokens, 200, shuffled=True)
        cases[f"{kernel} shuffled, sinks"] = Case(kernel, tokens, 200, shuffled=True, rule=WINDOWS["sinks"])
        for dtype in ("float32", "bfloat16"):
            cases[f"{kernel} int8 {dtype}"] = Case(
                kernel, tokens, 130, 4, 2, dtype=dtype, bits=8, ragged=False
            )
    for dtype, width in (("float32", 32), ("float32", 128), ("float16", 64)):
        cases[f"block mask {dtype} {width}"] = Case(
            "prefill", 200, 200, 4, 2, width=width, dtype=dtype, skipped=0.5, ragged=False
        )
    cases["block mask after a past"] = Case(
        "prefill", 65, 200, skipped=0.4, rule=WINDOWS["sinks"], ragged=False
    )
    for mask in ("bool", "additive", "one row"):
        cases[f"prefill {mask} mask"] = Case("prefill", 65, 130, mask=mask)
    cases["decode chosen"] = Case("decode", 1, 300, 4, 2, chosen=70, ragged=False)
    cases["decode chosen int8"] = Case("decode", 2, 300, 4, 2, chosen=100, bits=8, ragged=False)
    cases["decode chosen, window"] = Case(
        "decode", 1, 300, 4, 2, chosen=100, rule=WINDOWS["sinks"], ragged=False
    )
    return cases
