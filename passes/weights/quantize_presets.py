"""The presets of weights.quantize: published recipes, and what this project makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from memcompile.rewrite.pass_ import Preset

PRESETS: Final[Mapping[str, Preset]] = {
    "int8": Preset(
        {"bits": 8, "block_size": 32, "zero_point": "none", "method": "rtn"},
        "the symmetric 8-bit blocks of ONNX Runtime's MatMulNBits (com.microsoft); the same grid as "
        "GGUF's Q8_0, but for its sign and float32 scales",
        "Eight bits a weight, rounded to nearest.",
    ),
    "int8_smooth": Preset(
        {"bits": 8, "block_size": 32, "zero_point": "none", "method": "rtn", "scale_inputs": "mean"},
        "the scales of Lin et al. 2024, AWQ, arXiv:2306.00978, searched for int8 inputs as SmoothQuant "
        "means them (Xiao et al. 2023, arXiv:2211.10438)",
        "Eight bits a weight and an input, both rounded to nearest; inputs are scaled by what loses "
        "least on calibration text.",
    ),
    "int8_smoothquant": Preset(
        {"bits": 8, "block_size": 32, "method": "rtn", "scale_inputs": "largest", "scale_exponent": 0.5},
        "Xiao et al. 2023, SmoothQuant, arXiv:2211.10438",
        "Eight bits a weight and an input; half of an input's outliers move into the weight. The paper "
        "rounds whole tensors, this one blocks of 32.",
    ),
    "int8_mptq": Preset(
        {"bits": 8, "block_size": 32, "method": "rtn", "scale_inputs": "largest", "shift_inputs": True},
        "Tai & Wu 2024, MPTQ-ViT, arXiv:2401.14895",
        "Eight bits a weight and an input; inputs are centred, and scaled by a searched power. The bias "
        "makes up for the centre.",
    ),
    "int4": Preset(
        {"bits": 4, "block_size": 32, "zero_point": "integer", "method": "rtn"},
        "the 4-bit blocks with zero points of ONNX Runtime's MatMulNBits (com.microsoft)",
        "Four bits a weight, rounded to nearest, with integer zero points.",
    ),
    "int4_hqq": Preset(
        {"bits": 4, "block_size": 32, "zero_point": "integer", "method": "hqq"},
        "Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models (Mobius Labs); "
        "the blocks of ONNX Runtime's MatMulNBits",
        "Four bits a weight, scales fitted to a p-norm of the error. The original fits float zero "
        "points; the runtime has a fast kernel for integer ones only, so the scale is fitted instead.",
    ),
    "int4_awq": Preset(
        {"bits": 4, "block_size": 32, "zero_point": "integer", "method": "clip", "scale_inputs": "mean"},
        "Lin et al. 2024, AWQ, arXiv:2306.00978; the blocks of ONNX Runtime's MatMulNBits",
        "Four bits a weight: inputs are scaled by a searched power of their mean magnitude, then each "
        "block's range is clipped to where outputs change least.",
    ),
    "int4_awq_gptq": Preset(
        {
            "bits": 4,
            "block_size": 32,
            "zero_point": "integer",
            "method": "gptq",
            "clip": True,
            "scale_inputs": "mean",
        },
        "Lin et al. 2024, AWQ, arXiv:2306.00978, and Frantar et al. 2023, GPTQ, arXiv:2210.17323",
        "Four bits a weight: AWQ's scales and clipped ranges, GPTQ's rounding.",
    ),
    "int4_kmeans": Preset(
        {
            "bits": 4,
            "block_size": 32,
            "method": "kmeans",
            "weigh_inputs": True,
            "activations": "float",
        },
        "the tables of Cho et al. 2023, eDKM, arXiv:2309.00964, without its training",
        "Four bits a weight, each the number of one of 16 values that k-means finds for its matrix; an "
        "error counts by its input on calibration text.",
    ),
    "int4_kmeans_gptq": Preset(
        {
            "bits": 4,
            "block_size": 32,
            "method": "kmeans",
            "spread_errors": True,
            "activations": "float",
        },
        "the tables of Cho et al. 2023, eDKM, arXiv:2309.00964, without its training, and the rounding "
        "of Frantar et al. 2023, GPTQ, arXiv:2210.17323",
        "Four bits a weight, each the number of one of 16 values that k-means finds for its matrix, "
        "chosen column by column so that other columns make up for the error.",
    ),
    "int4_kmeans_distilled": Preset(
        {
            "bits": 4,
            "block_size": 32,
            "method": "kmeans",
            "spread_errors": True,
            "activations": "float",
            "recover": "distil",
        },
        "int4_kmeans_gptq, and the last phase of Chen et al. 2024, EfficientQAT, arXiv:2407.11062",
        "The same; then scales learn to give the predictions of the floats.",
    ),
    "edkm": Preset(
        {"bits": 3, "block_size": 32, "method": "kmeans", "weigh_inputs": True, "activations": "float"},
        "Cho et al. 2023, eDKM, arXiv:2309.00964",
        "Three bits a weight, each the number of one of 8 values that k-means finds for its matrix. The "
        "paper clusters while it trains, without scales; here nothing is trained, and blocks have "
        "scales.",
    ),
    "mixed_5bit": Preset(
        {
            "bits": "mixed",
            "average_bits": 5.0,
            "block_size": 32,
            "zero_point": "integer",
            "method": "clip",
            "scale_inputs": "mean",
        },
        "the greedy allocation of Tai & Wu 2024, MPTQ-ViT, arXiv:2401.14895, over AWQ's weights "
        "(Lin et al. 2024, arXiv:2306.00978)",
        "Four or eight bits by weight, five on average: what loses least for its bytes gets four. "
        "Losses are predicted in the Fisher metric, and not measured layer by layer.",
    ),
    "int4_gptq": Preset(
        {"bits": 4, "block_size": 32, "zero_point": "integer", "method": "gptq", "clip": True},
        "Frantar et al. 2023, GPTQ, arXiv:2210.17323; the blocks of ONNX Runtime's MatMulNBits",
        "Four bits a weight, rounded column by column so that other columns make up for the error on "
        "calibration text: those of the largest inputs first, on grids that were clipped before. A tied "
        "head shares the rounded embedding.",
    ),
    "int4_distilled": Preset(
        {
            "bits": 4,
            "block_size": 32,
            "zero_point": "integer",
            "method": "gptq",
            "clip": True,
            "recover": "distil",
        },
        "Frantar et al. 2023, GPTQ, arXiv:2210.17323, and the last phase of Chen et al. 2024, "
        "EfficientQAT, arXiv:2407.11062: codes stay, scales are trained",
        "Four bits a weight by GPTQ; then scales learn to give the predictions of the floats. They learn "
        "the manner of the calibration text too: take one like what the model will read.",
    ),
}
