"""`memcompile::attention` for CUDA tensors: which kernel takes which call."""

from __future__ import annotations

from typing import Any

import torch

from memcompile.backends.torch.triton.launch import Keys, Rule, decode, max_decode_rows, prefill, unsupported
from memcompile.dialect import attention_definition
from memcompile.dialect.cache_codes import code_dtype, code_width, dequantize, quantize

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
    general = rule.window == 0 and rule.softcap == 0.0 and mask is None and positions is None and not bits
    if general and past_k is None and (not rule.causal or q.shape[2] == k.shape[2]):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=rule.causal, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.contiguous(), *_no_state(k, v, bits)
    keys, values = k_state, v_state
    if bits == 4:
        assert k_scale is not None
        assert v_scale is not None
        keys = dequantize(k_state, k_scale, bits, k.shape[-1]).to(q.dtype)
        values = dequantize(v_state, v_scale, bits, v.shape[-1]).to(q.dtype)
    if unsupported(q, keys, values) is not None:
        return attention_definition(
            q, k, v, past_k, past_v, positions, mask, k_scale, v_scale, **attributes
        )  # fmt: skip
    tokens, total = q.shape[2], keys.shape[2]
    if positions is None:
        positions = torch.arange(total, device=q.device).unsqueeze(0)
    if rule.causal or rule.window or past_k is not None:
        q_positions = positions[:, total - tokens :]
    else:
        q_positions = torch.zeros((1, tokens), dtype=positions.dtype, device=q.device)
    store = Keys(keys, values, positions, k_scale, v_scale)
    rows = q.shape[1] // keys.shape[1] * tokens
    if mask is None and rows <= max_decode_rows(q.element_size()):
        out, _ = decode(q, q_positions, store, rule)
    else:
        out, _ = prefill(q, q_positions, store, rule, mask=mask)
    return (out, *_no_state(k, v, bits)) if past_k is None else (out, k_state, v_state)


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
