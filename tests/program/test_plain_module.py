"""A language model that transformers does not know, counting its own positions, is stepped all the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from memcompile.backends.torch import TorchSession
from memcompile.frontend import capture
from memcompile.program import build_program

VOCABULARY, WIDTH, HEADS = 61, 32, 4


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.norm(x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS).unbind(2)
        q, k, v = (h.transpose(1, 2) for h in heads)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class _PlainGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_model_that_counts_its_own_positions_is_continued() -> None:
    torch.manual_seed(0)
    model = _PlainGpt().eval()
    ids = torch.randint(0, VOCABULARY, (2, 17))
    captured = capture(model, (ids,))
    assert captured.model.causal
    session = TorchSession(build_program(captured))
    with torch.no_grad():
        want = model(ids[:1])[0].numpy()
    state = session.new_state(1)
    tokens = ids[0].tolist()
    got = [session.extend(state, tokens[a:b]) for a, b in ((0, 6), (6, 7), (7, 17))]
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-5, rtol=0)
