"""Finish a traced graph for ONNX Runtime's CUDA provider: GroupQueryAttention within what its kernel has.

What the kernel of onnxruntime-gpu 1.31.1 has and lacks, from the operator's schema, the types it is built for
and the messages in its library; nothing of this ran on a GPU:

- queries, keys and values in float16 or bfloat16, not in float32: such a node would run on the CPU, and
  the caches would travel there and back at every token;
- caches in the same type, int8 or int4; no `attention_bias` over a quantised cache;
- `local_window_size` W: a query sees W keys, itself among them, counted in slots of the cache.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from memcompile.backends.onnxruntime.ffn import whole_layers
from memcompile.backends.onnxruntime.finish import (
    BIAS,
    PATTERN,
    Q,
    all_inputs,
    finish,
    group_query_attention,
)
from memcompile.backends.onnxruntime.products import runtime_products
from memcompile.errors import MemcompileError

HALF_TYPES: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def for_cuda(model: ir.Model) -> ir.Model:
    """A copy of the traced model for the CUDA provider: the twin of `finish.portable`.

    Raises MC116 for attention in float32, for keys that are chosen at run time, and for sinks, strided blocks
    or a run-time mask over a quantised cache.
    """
    return finish(model, cuda_attention, runtime_products, whole_layers)


def cuda_attention(node: ir.Node) -> ir.Node:
    """GroupQueryAttention for one traced node, with its window as an attribute where that says all of it."""
    region = node.attributes.get_string("region", "")
    inputs = all_inputs(node)
    query = inputs[Q]
    assert query is not None
    if query.dtype not in HALF_TYPES:
        kind = "an unknown type" if query.dtype is None else query.dtype.name.lower()
        raise MemcompileError(
            "MC116",
            f"ONNX Runtime's CUDA provider has no GroupQueryAttention in {kind}, only in float16",
            where=f"attention region {region}",
            fix="set model.dtype to float16, or target.device to cpu",
        )
    if inputs[PATTERN] is not None:
        raise MemcompileError(
            "MC116",
            "ONNX Runtime's CUDA provider has no operator that chooses the keys of a prompt",
            where=f"attention region {region}",
            fix="leave attention.sparse out of the plan, or set target.device to cpu",
        )
    window = local_window(node)
    if node.attributes.get_int("bits", 0) and inputs[BIAS] is not None and not window:
        raise MemcompileError(
            "MC116",
            "ONNX Runtime's CUDA provider takes no sinks, strided blocks or mask over a quantised cache",
            where=f"attention region {region}",
            fix="leave these layers out of kv.quantize, or give them a window without sinks",
        )
    return group_query_attention(node, local_window=window)


def local_window(node: ir.Node) -> int:
    """The `local_window_size` that says all of who may look at whom in this traced node; 0 where none does.

    A windowed cache drops old tokens and keeps the order of the rest (`runtime/slots.py`). Without sinks and
    strided blocks the rest is one run of positions, so distances in slots are distances in positions.
    """
    names = node.attributes
    plain = not any(names.get_int(name, 0) for name in ("sinks", "stride", "masked"))
    causal: int = names.get_int("causal", 0)
    return names.get_int("window", 0) if plain and causal else 0
