"""Quantised weights: products as one traced operator, look-ups as GatherBlockQuantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.backends.onnxruntime.emitter import Emitter, emit, lowers
from memcompile.backends.onnxruntime.nodes import MEMCOMPILE, MICROSOFT
from memcompile.backends.onnxruntime.products import FLOAT, INT8, OPERATOR
from memcompile.dialect.quantized_weights import block_of
from memcompile.kernels import TYPES


@lowers(torch.ops.memcompile.quantized_linear.default)
def lower_quantized_linear(emitter: Emitter, node: fx.Node) -> torch.Tensor:
    """One node that `products.py` finishes."""
    given = _arguments(node)
    names = ("x", "codes", "scales", "zero_points", "offsets", "table", "bias")
    inputs = [emitter.value(given[name]) for name in names]
    x, codes, bits = inputs[0], inputs[1], int(given["bits"])
    rows = int(codes.shape[0])
    attributes = {
        "K": int(x.shape[-1]),
        "N": rows,
        "bits": bits,
        "block_size": block_of(codes, bits),
        # entries of a table are floats: int8 inputs would win nothing
        "accuracy_level": INT8 if given["int8_activations"] and given["table"] is None else FLOAT,
        "products": TYPES[emitter.products],
    }
    shape = (*x.shape[:-1], rows)
    return emit(f"{MEMCOMPILE}::{OPERATOR}", inputs, attributes, like=x, shape=shape, version=1)


@lowers(torch.ops.memcompile.quantized_embedding.default)
def lower_quantized_embedding(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """GatherBlockQuantized over the same stored codes that a tied head reads; a table is written out."""
    given = _arguments(node)
    if given["table"] is not None:
        return None
    indices, codes, scales, zero_points, offsets = (
        emitter.value(given[name]) for name in ("indices", "codes", "scales", "zero_points", "offsets")
    )
    bits, width = int(given["bits"]), int(given["width"])
    block = block_of(codes, bits)
    inputs = [codes.flatten(1), indices, scales]
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rows = emit(
        f"{MICROSOFT}::GatherBlockQuantized",
        inputs if zero_points is None else [*inputs, zero_points],
        attributes,
        like=scales,
        shape=(*indices.shape, codes.shape[1] * block),
    )
    # the last block may be filled up
    rows = rows[..., :width] if width % block else rows
    if offsets is None:
        return rows
    shifts = torch.nn.functional.embedding(indices, offsets)
    return rows + torch.matmul(shifts, _block_indicator(emitter, width, block, rows).mT)


@lowers(torch.ops.memcompile.quantized_experts.default)
def lower_quantized_experts(emitter: Emitter, node: fx.Node) -> torch.Tensor | None:
    """QMoE, which takes the choice of experts and their weights from outside.

    It knows SiLU, whole blocks, and no float activations at 8 bits: anything else is written out.
    """
    given = _arguments(node)
    x, index, weight = (emitter.value(given[name]) for name in ("x", "index", "weight"))
    bits, int8 = int(given["bits"]), bool(given["int8_activations"])
    names = ("codes", "scales", "zero_points")
    gate_up = [emitter.value(given[f"gate_up_{name}"]) for name in names]
    down = [emitter.value(given[f"down_{name}"]) for name in names]
    experts, rows = gate_up[0].shape[:2]
    block = block_of(gate_up[0], bits)
    if (
        given["activation"] != "silu"
        or x.shape[-1] % block
        or (rows // 2) % block
        or (bits == 8 and not int8)
    ):
        return None
    member = index.unsqueeze(-1) == torch.arange(experts)
    chosen = member.any(1).to(x.dtype)
    shares = (member * weight.to(x.dtype).unsqueeze(-1)).sum(1)
    no_bias_no_third = [None, None, None, None]
    first, second = gate_up[0].flatten(2), down[0].flatten(2)
    inputs = [x, chosen, first, gate_up[1], None, second, down[1], *no_bias_no_third]
    inputs += [gate_up[2], down[2], None, shares]
    attributes = {
        "k": int(index.shape[1]),
        "block_size": block,
        "expert_weight_bits": bits,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 0,
        "accuracy_level": INT8 if int8 else FLOAT,
    }
    return emit(f"{MICROSOFT}::QMoE", inputs, attributes, like=x)


def _block_indicator(emitter: Emitter, width: int, block: int, like: torch.Tensor) -> torch.Tensor:
    """float32 [width,blocks]: 1 where an input belongs to a block."""
    key = ("block indicator", width, block)
    if key not in emitter.memo:
        member = torch.arange(width) // block
        emitter.memo[key] = torch.nn.functional.one_hot(member, -(-width // block)).to(like.dtype)
    indicator: torch.Tensor = emitter.memo[key]
    return indicator


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
