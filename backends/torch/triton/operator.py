"""`memcompile::attention` for CUDA tensors: which kernel takes which call."""

from __future__ import annotations

from typing import Any

import torch

from memcompile.backends.torch.triton.launch import (
    BLOCK_TOKENS,
    Keys,
    Rule,
    decode,
    max_decode_rows,
    prefill,
    unsupported,
)
from memcompile.dialect import attention_definition
from memcompile.dialect.cache_codes import code_dtype, code_width, dequantize, quantize
from memcompile.dialect.op import accumulate_type
from memcompile.dialect.selection import FEW_QUERIES, select_for_rows

_RULE = ("scale", "causal", "window", "sinks", "block", "stride", "softcap")


def cuda_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pattern: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as `memcompile::attention` does, with the same arguments and results.

    A dense stateless call goes to torch's own fused attention. int4 caches are widened before the kernels
    read them; types and widths that the kernels do not take go to the definition.
    """
    bits = int(attributes.get("bits", 0))
    rule = Rule(**{name: attributes[name] for name in _RULE if name in attributes})
    k_state = _state(k, past_k, k_scale, bits)
    v_state = _state(v, past_v, v_scale, bits)
    tokens, total = q.shape[2], k_state.shape[2]
    if tokens <= FEW_QUERIES or total <= attributes.get("pattern_from", 0):
        pattern = None
    given = (past_k, positions, mask, pattern)
    plain = all(x is None for x in given) and not (rule.window or rule.softcap or bits)
    if plain and (not rule.causal or tokens == k.shape[2]):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=rule.causal, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.contiguous(), *_no_state(k, v, bits)
    keys, values = k_state, v_state
    if bits == 4:
        keys, values = _floats(k_state, k_scale, q, bits), _floats(v_state, v_scale, q, bits)
    # no kernel chooses pages
    if unsupported(q, keys, values) is not None or (bounds is not None and tokens == 1):
        return attention_definition(
            q, k, v, past_k, past_v, positions, mask, k_scale, v_scale, pattern, bounds, **attributes
        )  # fmt: skip
    if positions is None:
        positions = torch.arange(total, device=q.device).unsqueeze(0)
    if rule.causal or rule.window or past_k is not None:
        q_positions = positions[:, total - tokens :]
    else:
        q_positions = torch.zeros((1, tokens), dtype=positions.dtype, device=q.device)
    store = Keys(keys, values, positions, k_scale, v_scale)
    rows = q.shape[1] // keys.shape[1] * tokens
    if pattern is not None:
        read = _floats(keys, k_scale, q, bits) if store.bits else keys
        out = _patterned(q, q_positions, store, rule, mask, read, pattern, attributes["pattern_block"])
    elif mask is None and rows <= max_decode_rows(q.element_size()):
        out, _ = decode(q, q_positions, store, rule)
    else:
        out, _ = prefill(q, q_positions, store, rule, mask=mask)
    return (out, *_no_state(k, v, bits)) if past_k is None else (out, k_state, v_state)


def _patterned(
    q: torch.Tensor, q_positions: torch.Tensor, store: Keys, rule: Rule, mask: torch.Tensor | None,
    read: torch.Tensor, pattern: torch.Tensor, block: int,
) -> torch.Tensor:  # fmt: skip
    """Read a prompt with the keys that each head chooses; blocks of which nothing is chosen are skipped.

    The choice is the definition's own, made in torch; it is made for one key/value head at a time, because it
    takes a byte for each pair of query and key.
    """
    batch, heads, tokens, _ = q.shape
    groups, slots = store.k.shape[1:3]
    repeats, work = heads // groups, accumulate_type(q.dtype)
    padding = (0, -slots % BLOCK_TOKENS, 0, -tokens % BLOCK_TOKENS)
    parts = []
    for group in range(groups):
        own = slice(group * repeats, (group + 1) * repeats)
        chosen = select_for_rows(
            q[:, own].to(work), read[:, group : group + 1].to(work), store.positions, pattern[own],
            block=block, begin=0, scale=rule.scale,
        )  # fmt: skip
        tiles = torch.nn.functional.pad(chosen, padding)
        tiles = tiles.reshape(batch, repeats, tiles.shape[2] // BLOCK_TOKENS, BLOCK_TOKENS, -1, BLOCK_TOKENS)
        part = Keys(
            store.k[:, group : group + 1], store.v[:, group : group + 1], store.positions,
            _channels(store.k_scale, group, groups), _channels(store.v_scale, group, groups),
        )  # fmt: skip
        given = chosen
        if mask is not None:
            all_heads = mask.expand(batch, heads, tokens, slots)[:, own]
            given = (
                chosen & all_heads
                if mask.dtype == torch.bool
                else all_heads.masked_fill(~chosen, float("-inf"))
            )
        parts.append(
            prefill(q[:, own], q_positions, part, rule, mask=given, block_mask=tiles.any(dim=5).any(dim=3))[0]
        )
    return torch.cat(parts, dim=1)


def _channels(scale: torch.Tensor | None, group: int, groups: int) -> torch.Tensor | None:
    """The scales [D] of one key/value head."""
    return None if scale is None else scale.reshape(groups, -1)[group]


def _floats(codes: torch.Tensor, scale: torch.Tensor | None, q: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes stand for, in the queries' type."""
    assert scale is not None
    width = codes.shape[-1] if bits == 8 else scale.numel() // codes.shape[1]
    return dequantize(codes, scale, bits, width).to(q.dtype)


def _state(
    new: torch.Tensor, past: torch.Tensor | None, scale: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Cached and new keys (or values) as they are stored: floats, or codes where there are `bits`."""
    codes = quantize(new, scale, bits) if bits and scale is not None else new
    return codes if past is None else torch.cat((past, codes), dim=2)


def _no_state(k: torch.Tensor, v: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The empty state of a stateless call."""
    empty = [
        x.new_empty((*x.shape[:2], 0, code_width(bits, x.shape[-1])), dtype=code_dtype(bits, x.dtype))
        for x in (k, v)
    ]
    return empty[0], empty[1]
