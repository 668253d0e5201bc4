"""The torch target: the rewritten model as an `nn.Module`, and its program run step by step."""

from __future__ import annotations

from memcompile.backends.torch.module import RewrittenModule
from memcompile.backends.torch.session import TorchSession

__all__ = ["RewrittenModule", "TorchSession"]
