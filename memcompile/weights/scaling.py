"""Scale the inputs of products, and their weights' columns the other way, so that rounding hurts less.

`x @ W.T` is `(x / s) @ (W * s).T` for any positive s [K]. A scale that follows the inputs' magnitude makes
small steps of the columns that matter (Lin et al. 2024, "AWQ: Activation-aware Weight Quantization",
arXiv:2306.00978), and takes outliers out of inputs that are rounded themselves (Xiao et al. 2023,
"SmoothQuant", arXiv:2211.10438). How much of it, the exponent, is searched by the error of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from memcompile.dialect.quantized_linear import rounded_activations

ScaleInputs = Literal["none", "mean", "largest"]
# exponents that a search tries; 0 is no scaling
EXPONENTS: Final = tuple(step / 10 for step in range(10))
# rows of calibration inputs that the search multiplies by
SAMPLE_ROWS: Final = 512


@dataclass(frozen=True)
class Inputs:
    """What calibration keeps of the inputs [T,K] of a product.

    hessian: the sum of x xᵀ, [K,K]; mean and largest magnitude of each channel, smallest and largest value,
    [K]; sample: some of the rows, [t,K]. All of the shifted inputs, if they are shifted.
    """

    hessian: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor
    sample: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def of(cls, windows: Sequence[torch.Tensor], *, shift: bool) -> Inputs:
        """Read them off every window's inputs [...,K]; `shift` centres each channel between its extremes."""
        flat = [window.reshape(-1, window.shape[-1]).float() for window in windows]
        middle = None
        if shift:
            low = torch.stack([rows.amin(0) for rows in flat]).amin(0)
            high = torch.stack([rows.amax(0) for rows in flat]).amax(0)
            middle = (low + high) / 2
            flat = [rows - middle for rows in flat]
        width, tokens = flat[0].shape[-1], sum(len(rows) for rows in flat)
        hessian, mean, largest = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)
        for rows in flat:
            hessian += rows.T @ rows
            mean += rows.abs().sum(0) / tokens
            largest = torch.maximum(largest, rows.abs().amax(0))
        each = max(1, SAMPLE_ROWS // len(flat))
        sample = torch.cat([rows[:: max(1, len(rows) // each)][:each] for rows in flat])
        return cls(hessian, mean, largest, sample, middle)


def scale_of(
    inputs: Inputs, weights: Sequence[torch.Tensor], kind: ScaleInputs, exponent: float
) -> torch.Tensor:
    """The scale [K] that weights [N,K] of one input are multiplied by.

    mean (AWQ): mean|x|^exponent. largest (SmoothQuant): max|x|^exponent / max|W|^(1-exponent). Channels that
    were never used keep theirs. The geometric middle of all is 1.
    """
    if kind == "none" or exponent == 0:
        return torch.ones_like(inputs.mean)
    base = inputs.mean if kind == "mean" else inputs.largest
    used = base > 0
    scale = base.clamp(min=float(base.max()) * 1e-4 + 1e-30).log() * exponent
    if kind == "largest":
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        scale = scale - columns.clamp(min=1e-5).log() * (1 - exponent)
    scale = scale - (scale[used].max() + scale[used].min()) / 2 if bool(used.any()) else scale
    return torch.where(used, scale.exp(), torch.ones_like(scale))


def search_scale(
    inputs: Inputs,
    weights: Sequence[torch.Tensor],
    kind: ScaleInputs,
    exponents: Sequence[float],
    rounded: Callable[[int, torch.Tensor], torch.Tensor],
    int8_block: int | None,
) -> tuple[torch.Tensor, float]:
    """The scale whose rounded weights change the outputs of the sample least, and its exponent.

    rounded: a weight, by its index, as its codes stand for it. int8_block: inputs are rounded too, in blocks
    of that size.
    """
    wanted = [inputs.sample @ weight.T for weight in weights]
    best: tuple[float, torch.Tensor, float] | None = None
    for exponent in exponents:
        scale = scale_of(inputs, weights, kind, exponent)
        scaled = inputs.sample / scale
        if int8_block is not None:
            scaled = rounded_activations(scaled, int8_block)
        error = sum(
            float((scaled @ rounded(index, weight * scale).T - want).pow(2).sum())
            for index, (weight, want) in enumerate(zip(weights, wanted, strict=True))
        )
        if best is None or error < best[0]:
            best = (error, scale, exponent)
    assert best is not None
    return best[1], best[2]
