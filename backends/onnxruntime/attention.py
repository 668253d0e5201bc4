"""`memcompile::attention` with state becomes one node over buffers that are past and present.

The node has what every implementation needs; `finish.py` makes of it an operator that a runtime has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import Emitter, emit, lowers
from memcompile.backends.onnxruntime.finish import ATTENTION, MEASURED, PAGE_BOUNDS
from memcompile.backends.onnxruntime.layout import pack_heads, remember_output
from memcompile.dialect import visible_keys
from memcompile.kernels import TYPES
from memcompile.regions import argument

# GroupQueryAttention refuses other head widths; heads are padded with zeros, which changes no score
WIDTH_MULTIPLE = 8
INT32 = torch.int32


def padded_width(head_dim: int) -> int:
    """The head width a cache has in the lowered program."""
    return -(-head_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


@lowers(torch.ops.memcompile.attention.default)
def lower_attention(emitter: Emitter, node: fx.Node) -> tuple[torch.Tensor, ...] | None:
    """Attention with a cache becomes one node; a stateless call is left to torch's own."""
    facts = {a.name: argument(node, a.name) for a in node.target._schema.arguments}  # type: ignore[union-attr]
    if facts["past_k"] is None:
        return _stateless(emitter, facts)
    q, k, v = (emitter.value(facts[name]) for name in "qkv")
    batch, heads, tokens, width = q.shape
    kv_heads, v_width = k.shape[1], v.shape[3]
    stored = padded_width(max(width, v_width))
    packed = [
        _widen_heads(pack_heads(emitter, facts[name]), int(h), w, stored)
        for name, h, w in (("q", heads, width), ("k", kv_heads, width), ("v", kv_heads, v_width))
    ]
    past_k, past_v = emitter.value(facts["past_k"]), emitter.value(facts["past_v"])
    last_slot, slots = _lengths(emitter, facts["positions"])
    bias = _bias(emitter, facts, q)
    attributes: dict[str, Any] = {
        "num_heads": int(heads),
        "kv_num_heads": int(kv_heads),
        "scale": float(facts["scale"]),
        "softcap": float(facts["softcap"]),
        "bits": int(facts["bits"]),
        "region": str(facts["region"]),
        "block_tokens": int(facts["pattern_block"]),
        "pattern_from": int(facts["pattern_from"]),
        "masked": int(facts["mask"] is not None),
        "products": TYPES[emitter.products],
        **{name: int(facts[name]) for name in ("page_tokens", "page_keep", "page_from")},
        **{name: int(bool(node.meta.get(name))) for name in MEASURED},
        **{name: int(facts[name]) for name in ("causal", "window", "sinks", "block", "stride")},
    }
    scales: list[torch.Tensor | None] = [None, None]
    if facts["bits"]:
        scales = [
            _widen_scale(emitter.value(facts[name]), int(kv_heads), w, stored)
            for name, w in (("k_scale", width), ("v_scale", v_width))
        ]
    positions = emitter.value(facts["positions"]) if facts["window"] else None
    pattern, bounds = emitter.value(facts["pattern"]), emitter.value(facts["bounds"])
    out, present_k, present_v = torch.onnx.ops.symbolic_multi_out(
        ATTENTION,
        [*packed, past_k, past_v, last_slot, slots, positions, *scales, pattern, bias, bounds],
        attributes,
        dtypes=[q.dtype, past_k.dtype, past_v.dtype],
        shapes=[(batch, tokens, heads * stored), past_k.shape, past_v.shape],
        version=1,
    )
    out_BTHD = out.view(batch, tokens, heads, stored)[..., :v_width]
    remember_output(
        emitter, node, out if stored == v_width else out_BTHD.reshape(batch, tokens, heads * v_width)
    )
    return out_BTHD.transpose(1, 2), present_k, present_v


@lowers(torch.ops.memcompile.page_bounds.default)
def lower_page_bounds(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """One node over a buffer that holds the bounds before and after."""
    names = ("k", "past", "positions", "k_scale", "page_tokens", "bits")
    k, past, positions, k_scale, page_tokens, bits = (argument(node, name) for name in names)
    kv_heads, width = emitter.value(k).shape[1], emitter.value(k).shape[3]
    stored = padded_width(width)
    packed = _widen_heads(pack_heads(emitter, k), int(kv_heads), width, stored)
    last_slot, _ = _lengths(emitter, positions)
    scale = _widen_scale(emitter.value(k_scale), int(kv_heads), width, stored) if bits else None
    return emit(
        PAGE_BOUNDS,
        [packed, emitter.value(past), last_slot, scale],
        {"kv_num_heads": int(kv_heads), "page_tokens": int(page_tokens), "bits": int(bits)},
        like=emitter.value(past),
        version=1,
    )


def _widen_heads(packed: torch.Tensor, heads: int, width: Any, stored: int) -> torch.Tensor:
    if width == stored:
        return packed
    batch, tokens = packed.shape[:2]
    split = packed.reshape(batch, tokens, heads, width)
    return torch.nn.functional.pad(split, (0, stored - width)).reshape(batch, tokens, heads * stored)


def _widen_scale(scale: torch.Tensor, heads: int, width: Any, stored: int) -> torch.Tensor:
    if width == stored:
        return scale
    padded = torch.nn.functional.pad(scale.reshape(heads, width), (0, stored - width), value=1.0)
    return padded.reshape(heads * stored)


def _lengths(emitter: Emitter, positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's last used slot [B] and the number of slots in use [], both int32, once per group."""
    key = ("lengths", positions)
    if key not in emitter.memo:
        table = emitter.tables.get(positions.target)
        valid = table if table is not None else (emitter.value(positions) >= 0).to(torch.int64)
        last_slot = (valid.sum(dim=1) - 1).to(INT32)
        shape = emit("Shape", [valid], {"start": 1, "end": 2}, like=valid, shape=(1,))
        slots = emit("Squeeze", [shape], {}, like=shape, shape=())
        emitter.memo[key] = last_slot, slots.to(INT32)
    lengths: tuple[torch.Tensor, torch.Tensor] = emitter.memo[key]
    return lengths


def _bias(emitter: Emitter, facts: dict[str, Any], q: torch.Tensor) -> torch.Tensor | None:
    """What GroupQueryAttention adds to the scores, [B,1,T,S]: a window from positions, or a runtime mask."""
    mask = emitter.value(facts["mask"])
    lowest = torch.finfo(q.dtype).min / 2
    bias: torch.Tensor | None = None
    if facts["window"]:
        names = ("causal", "window", "sinks", "block", "stride")
        key = ("bias", facts["positions"], *(facts[name] for name in names))
        if key not in emitter.memo:
            table = emitter.value(facts["positions"])
            # a row's slots are its columns, so its queries are found by position, not by column
            queries = emitter.tables.get("position_ids")
            if queries is None:
                queries = table[:, table.shape[1] - q.shape[2] :]
            seen = visible_keys(queries, table, **{name: facts[name] for name in names})
            emitter.memo[key] = torch.where(seen, 0.0, lowest).to(q.dtype).unsqueeze(1)
        bias = emitter.memo[key]
    if mask is not None:
        added = torch.where(mask, 0.0, lowest).to(q.dtype) if mask.dtype == torch.bool else mask.to(q.dtype)
        bias = added if bias is None else bias + added
    return bias


def _stateless(emitter: Emitter, facts: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    """A whole-sequence call without positions, window or softcap is torch's own attention."""
    special = ("positions", "window", "softcap", "bits")
    if any(facts[name] for name in special):
        return None
    q, k, v = (emitter.value(facts[name]) for name in "qkv")
    mask = emitter.value(facts["mask"])
    if facts["causal"] and (mask is not None or q.shape[2] != k.shape[2]):
        return None
    if mask is not None and mask.dtype == torch.bool:
        # a row that may look nowhere gives 0 by definition, NaN in the fused operator
        return None
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=facts["causal"], scale=facts["scale"]
    )
    return out, k[:, :, :0], v[:, :, :0]
