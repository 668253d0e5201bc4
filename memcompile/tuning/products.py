"""Linear layers as they are tuned: one product of a chunk of a prompt, or of one token, with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memcompile.tuning.space import Candidate, Sizes

PRODUCT_PREFILL: Final = "linear.prefill"
PRODUCT_DECODE: Final = "linear.decode"
# tokens of a prompt that are fed at once
CHUNK_TOKENS: Final = 512
SEED: Final = 0


@dataclass(frozen=True)
class Product:
    """x [rows,width] times the transpose of a weight [features,width]."""

    operator: str
    rows: int
    width: int
    features: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"rows": self.rows, "width": self.width, "features": self.features}

    @classmethod
    def from_sizes(cls, operator: str, sizes: Sizes) -> Product:
        """The product that has these sizes."""
        return cls(operator, sizes["rows"], sizes["width"], sizes["features"])

    def __str__(self) -> str:
        return f"linear {self.rows:,} x {self.width:,} -> {self.features:,}"

    def repeats(self, candidate: Candidate) -> int:
        """Calls of one run."""
        del candidate
        return 1

    def runs(self, candidate: Candidate) -> float:
        """Runs that the work takes."""
        del candidate
        return 1.0

    def inputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """x and the weight, float32."""
        rng = np.random.default_rng(SEED)
        return (
            rng.standard_normal((self.rows, self.width), np.float32),
            rng.standard_normal((self.features, self.width), np.float32),
        )


def products(width: int, features: int, prompt_tokens: int, batch: int = 1) -> tuple[Product, Product]:
    """A linear layer while a prompt is read, in chunks, and while tokens are decoded."""
    return (
        Product(PRODUCT_PREFILL, min(CHUNK_TOKENS, prompt_tokens), width, features),
        Product(PRODUCT_DECODE, batch, width, features),
    )
