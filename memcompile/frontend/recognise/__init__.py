"""Recognition: find attention, RMS norms and rotary embeddings in a graph, prove what they are, replace them."""

from __future__ import annotations

from memcompile.frontend.recognise.attention import recognise

__all__ = ["recognise"]
