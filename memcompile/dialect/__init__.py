"""The dialect: custom operators in the torch namespace `memcompile::`, each declared once in this folder."""

from __future__ import annotations

from memcompile.dialect.attention import ATTENTION, attention, attention_definition, visible_keys
from memcompile.dialect.experts import EXPERTS, experts
from memcompile.dialect.ffn import NEURON_COUNTS, SPARSE_FFN, neuron_counts, sparse_ffn
from memcompile.dialect.observe import OBSERVE, observe
from memcompile.dialect.op import DIALECT, Cost, DialectOp
from memcompile.dialect.pages import PAGE_BOUNDS, page_bounds
from memcompile.dialect.quantized_embedding import QUANTIZED_EMBEDDING, quantized_embedding
from memcompile.dialect.quantized_experts import QUANTIZED_EXPERTS, quantized_experts
from memcompile.dialect.quantized_linear import QUANTIZED_LINEAR, quantized_linear
from memcompile.dialect.rms_norm import RMS_NORM, rms_norm
from memcompile.dialect.rotary import ROTARY, rotary

__all__ = [
    "ATTENTION", "DIALECT", "EXPERTS", "NEURON_COUNTS", "OBSERVE", "PAGE_BOUNDS", "QUANTIZED_EMBEDDING",
    "QUANTIZED_EXPERTS", "QUANTIZED_LINEAR", "RMS_NORM", "ROTARY", "SPARSE_FFN", "Cost", "DialectOp",
    "attention", "attention_definition", "experts", "neuron_counts", "observe", "page_bounds",
    "quantized_embedding", "quantized_experts", "quantized_linear", "rms_norm", "rotary", "sparse_ffn",
    "visible_keys",
]  # fmt: skip
