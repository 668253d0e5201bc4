"""Recognition: find attention, RMS norms and rotary embeddings in a graph, prove them, replace them."""

from __future__ import annotations

from memcompile.frontend.recognise.attention import recognise
from memcompile.frontend.recognise.norms import recognise_norms
from memcompile.frontend.recognise.rotary import recognise_rotary

__all__ = ["recognise", "recognise_norms", "recognise_rotary"]
