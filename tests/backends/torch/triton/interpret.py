"""Run the kernels in Triton's interpreter, on the CPU, beside their definition in float64; print the errors
as JSON.

python -m tests.backends.torch.triton.interpret

A process of its own, because TRITON_INTERPRET decides what a kernel is when triton is imported.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from memcompile.backends.torch.triton.launch import Keys, Rule, decode, merge, prefill
from memcompile.backends.torch.triton.operator import cuda_attention
from memcompile.dialect import attention_definition, visible_keys
from memcompile.dialect.cache_codes import dequantize, quantize
from tests.backends.torch.triton.cases import Case, all_cases

BLOCK = 64


def run(case: Case) -> dict[str, float]:
    """The largest errors of output and log-sum-exp; infinite where one is NaN or the wrong infinity."""
    generator = torch.Generator().manual_seed(case.tokens * 1000 + case.keys)
    dtype = getattr(torch, case.dtype)
    sizes = ((case.heads, case.tokens, case.width), (case.groups, case.keys, case.width))
    sizes += ((case.groups, case.keys, case.v_width or case.width),)
    q, k, v = (torch.randn(case.batch, *size, generator=generator).to(dtype) for size in sizes)
    positions = torch.arange(case.keys).repeat(case.batch, 1)
    if case.shuffled:
        cached = case.keys - case.tokens
        positions[:, :cached] = positions[:, torch.randperm(cached, generator=generator)]
    if case.ragged and case.keys > 3:
        # the last slot is the last query's own: a row that sees nothing
        for slot in (0, case.keys // 2, case.keys - 1):
            positions[1, slot] = -1
            k[1, :, slot] = v[1, :, slot] = float("nan")
    rule = Rule(**{"scale": case.width**-0.5} | case.rule)
    keys = Keys(k, v, positions)
    k64, v64 = k.double(), v.double()
    if case.bits:
        scales = [
            x.float().abs().amax((0, 2)).flatten() / 127
            for x in (k, v)
        ]  # fmt: skip
        codes = [quantize(x, s, 8) for x, s in zip((k, v), scales, strict=True)]
        keys = Keys(*codes, positions, *scales)
        k64, v64 = (dequantize(c, s.double(), 8, c.shape[-1]) for c, s in zip(codes, scales, strict=True))
    return _compare(case, generator, q, keys, rule, k64, v64)


def _compare(
    case: Case,
    generator: torch.Generator,
    q: torch.Tensor,
    keys: Keys,
    rule: Rule,
    k64: torch.Tensor,
    v64: torch.Tensor,
) -> dict[str, float]:
    positions = keys.positions
    q_positions = positions[:, case.keys - case.tokens :]
    if not rule.causal and not rule.window:
        q_positions = torch.zeros((1, case.tokens), dtype=torch.int64)
    options: dict[str, Any] = {}
    mask: torch.Tensor | None = None
    if case.mask:
        shape = (
            (case.batch, case.heads, case.tokens, case.keys)
            if case.mask != "one row"
            else (1, 1, 1, case.keys)
        )
        given = torch.randn(shape, generator=generator)
        mask = given > 0 if case.mask == "bool" else given
        options["mask"] = mask
    if case.skipped:
        blocks = (-(-case.tokens // BLOCK), -(-case.keys // BLOCK))
        kept = torch.rand((case.batch, case.heads, *blocks), generator=generator) >= case.skipped
        # one block of keys that no query of the first key/value head visits
        kept[:, : case.heads // case.groups, :, 1] = False
        # what is skipped by every head that reads it may hold anything, also where positions say it is there
        nobody = ~kept.unflatten(1, (case.groups, -1)).any(dim=2).any(dim=2)
        assert nobody.any()
        spread = nobody.repeat_interleave(BLOCK, dim=2)[..., : case.keys]
        for x in (keys.k, keys.v):
            x.masked_fill_(spread.unsqueeze(-1), float("nan"))
        k64, v64 = (x.masked_fill(spread.unsqueeze(-1), 0.0) for x in (k64, v64))
        options["block_mask"] = kept.to(torch.uint8)
        mask = kept.repeat_interleave(BLOCK, dim=2).repeat_interleave(BLOCK, dim=3)
        mask = mask[:, :, : case.tokens, : case.keys]
    if case.chosen:
        picks = torch.rand(case.batch, case.groups, case.keys, generator=generator).argsort(-1)
        slots = picks[..., : case.chosen].clone()
        slots[0, 0, ::7] = -1
        options["slots"] = slots
        mask = torch.zeros(case.batch, case.groups, case.keys + 1, dtype=torch.bool)
        mask = mask.scatter_(2, torch.where(slots < 0, case.keys, slots), True)[..., :-1]
        mask = mask.repeat_interleave(case.heads // case.groups, dim=1).unsqueeze(2)
    if case.splits:
        options["splits"] = case.splits
    run_kernel = prefill if case.kernel == "prefill" else decode
    out, lse = run_kernel(q, q_positions, keys, rule, **options)
    want, want_lse = judge(q.double(), k64, v64, q_positions, positions, mask, rule)
    return {"out": worst(out, want), "lse": worst(lse, want_lse)}


def judge(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    rule: Rule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition's output in float64, and the log-sum-exp of the same scores."""
    who = {name: getattr(rule, name) for name in ("causal", "window", "sinks", "block", "stride")}
    want = attention_definition(
        q, k, v, positions=positions, mask=mask, scale=rule.scale, softcap=rule.softcap, **who
    )[0]
    repeated = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, repeated) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    allowed = visible_keys(q_positions, positions, **who).unsqueeze(1)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask
    return want, torch.logsumexp(scores.masked_fill(~allowed, -math.inf), dim=-1)


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over 1 + |want|, where equal infinities differ by 0 and NaN by infinity."""
    difference = torch.where(got.double() == want, 0.0, (got.double() - want).abs() / (1 + want.abs()))
    return float(difference.nan_to_num(nan=math.inf).max())


def merged() -> dict[str, float]:
    """Attention over two parts of the keys, merged, against attention over all of them."""
    q, k, v = (
        torch.randn(2, h, n, 32, generator=torch.Generator().manual_seed(h))
        for h, n in ((4, 65), (2, 150), (2, 150))
    )
    positions = torch.arange(150).repeat(2, 1)
    rule = Rule(0.2, window=60, sinks=2)
    parts = [
        prefill(q, positions[:, 85:], Keys(k[:, :, part], v[:, :, part], positions[:, part]), rule)
        for part in (slice(0, 30), slice(30, 150))
    ]
    out, lse = merge(*(torch.stack(x) for x in zip(*parts, strict=True)), dtype=q.dtype)
    want, want_lse = prefill(q, positions[:, 85:], Keys(k, v, positions), rule)
    return {"out": worst(out, want.double()), "lse": worst(lse, want_lse.double())}


def operator(bits: int, dtype: torch.dtype, **rule: Any) -> dict[str, float]:
    """`memcompile::attention` as CUDA tensors meet it: a prompt, then three tokens; outputs and states."""
    generator = torch.Generator().manual_seed(bits)
    scales = [torch.rand(2 * 32, generator=generator) * 0.02 + 0.02 if bits else None for _ in "kv"]
    if bits == 4:
        scales = [s * 16 if s is not None else None for s in scales]
    got_state = want_state = tuple(quantized_empty(bits, dtype) for _ in "kv")
    errors = {"out": 0.0, "state": 0.0}
    total = 0
    for tokens in (70, 1, 2):
        q, k, v = (torch.randn(2, h, tokens, 32, generator=generator).to(dtype) for h in (4, 2, 2))
        total += tokens
        positions = torch.arange(total).repeat(2, 1)
        arguments = {
            "positions": positions,
            "k_scale": scales[0],
            "v_scale": scales[1],
            "scale": 0.2,
            "bits": bits,
        }
        out, *got_state = cuda_attention(q, k, v, *got_state, **arguments, **rule, region="0")
        want, *want_state = attention_definition(q, k, v, *want_state, **arguments, **rule)
        errors["out"] = max(errors["out"], worst(out, want.double()))
        for a, b in zip(got_state, want_state, strict=True):
            same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
            errors["state"] = max(errors["state"], 0.0 if same else math.inf)
    return errors


def stateless(**arguments: Any) -> dict[str, float]:
    """`memcompile::attention` without a cache, as CUDA tensors meet it."""
    q, k, v = (torch.randn(2, h, 65, 32, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    out, k_state, v_state = cuda_attention(q, k, v, scale=0.2, **arguments)
    want, want_k, want_v = attention_definition(q, k, v, scale=0.2, **arguments)
    shaped = k_state.shape == want_k.shape and v_state.shape == want_v.shape
    return {"out": worst(out, want.double()), "state": 0.0 if shaped else math.inf}


def patterned(bits: int, **given: Any) -> dict[str, float]:
    """A prompt in two parts, read with a pattern of every kind: outputs and states."""
    generator = torch.Generator().manual_seed(7)
    kinds = [(0, 0, 0, 0), (1, 64, 64, 0), (2, 2, 1, 0), (4, 30, 50, 0)]
    pattern = torch.tensor(kinds, dtype=torch.int32)
    scales = [torch.full((2 * 32,), 0.03) if bits else None for _ in "kv"]
    got_state = want_state = tuple(quantized_empty(bits, torch.float32) for _ in "kv")
    errors = {"out": 0.0, "state": 0.0}
    total = 0
    for tokens in (130, 70, 3):
        q, k, v = (torch.randn(2, h, tokens, 32, generator=generator) for h in (4, 2, 2))
        total += tokens
        positions = torch.arange(total).repeat(2, 1)
        positions[1, 5] = -1
        arguments = {"positions": positions, "k_scale": scales[0], "v_scale": scales[1], "pattern": pattern}
        arguments |= {"scale": 0.2, "bits": bits, "pattern_block": 64, **given}
        if "mask" in given:
            arguments["mask"] = torch.randn(1, 4, tokens, total, generator=generator)
        out, *got_state = cuda_attention(q, k, v, *got_state, **arguments)
        want, *want_state = attention_definition(q, k, v, *want_state, **arguments)
        errors["out"] = max(errors["out"], worst(out, want.double()))
        same = all(torch.equal(a, b) for a, b in zip(got_state, want_state, strict=True))
        errors["state"] = max(errors["state"], 0.0 if same else math.inf)
    return errors


def quantized_empty(bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The state before the first token."""
    kind = {0: dtype, 8: torch.int8, 4: torch.uint8}[bits]
    return torch.zeros(2, 2, 0, 16 if bits == 4 else 32, dtype=kind)


def main() -> None:
    """Print {name: errors} of every case and of the laws."""
    results = {name: run(case) for name, case in all_cases().items()}
    results["law: merged parts"] = merged()
    for bits in (0, 8, 4):
        results[f"operator: {bits} bits float32"] = operator(bits, torch.float32)
        results[f"operator: {bits} bits bfloat16, sinks"] = operator(bits, torch.bfloat16, window=16, sinks=4)
    results["operator: float64 goes to the definition"] = operator(0, torch.float64)
    results["operator: stateless dense"] = stateless()
    results["operator: stateless bidirectional"] = stateless(causal=False)
    results["operator: stateless window"] = stateless(window=9)
    results["operator: stateless padding"] = stateless(
        causal=False, positions=torch.where(torch.arange(65) < 50, torch.arange(65), -1).repeat(2, 1)
    )
    results["operator: patterns"] = patterned(0)
    results["operator: patterns over int8"] = patterned(8)
    results["operator: patterns under a mask"] = patterned(0, mask="additive")
    results["operator: patterns from 131 keys on"] = patterned(0, pattern_from=130)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
