"""RMS norms and rotary embeddings: found in their spellings, look-alikes left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memcompile.frontend.recognise import recognise_norms, recognise_rotary
from tests.frontend.graphs import MODEL, WIDTH, export, hidden


class Local(nn.Module):
    """Applies `function(x, weight)`."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, MODEL))

    def forward(self, x):
        return self.function(x, self.weight)


def llama(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * wide.to(x.dtype)


def gemma(x, w):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + w.float())).type_as(x)


def power(x, w):
    return x * torch.pow((x * x).mean(dim=-1, keepdim=True) + 1e-5, -0.5) * w


def divided(x, w):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w


def functional(x, w):
    return nn.functional.rms_norm(x, (MODEL,), w, 1e-5)


def functional_default_eps(x, w):
    return nn.functional.rms_norm(x, (MODEL,), w)


@pytest.mark.parametrize("spelling", [llama, gemma, power, divided, functional, functional_default_eps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finds_an_rms_norm(spelling, dtype):
    module = Local(spelling).to(dtype)
    x = hidden().to(dtype)
    graph = export(module, (x,))
    assert recognise_norms(graph) == 1
    got = graph(x)
    assert got.dtype == dtype
    # bfloat16 may round once more or once less
    exact = dtype == torch.float32
    assert torch.allclose(got, module(x), atol=1e-6, rtol=0 if exact else 2**-6)
    assert sum(n.op == "call_function" and "aten.rsqrt" in str(n.target) for n in graph.graph.nodes) == 0


def over_tokens(x, w):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w


def cubes(x, w):
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6) * w


def of_another(x, w):
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def without_weight(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("spelling", [over_tokens, cubes, of_another, without_weight])
def test_leaves_other_norms_alone(spelling):
    graph = export(Local(spelling), (hidden(),))
    assert recognise_norms(graph) == 0


class Rotate(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, cos, sin):
        return self.function(x.view(x.shape[0], x.shape[1], -1, WIDTH).transpose(1, 2), cos, sin)


def half_turned(x):
    return torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), dim=-1)


def hugging_face(x, cos, sin):
    return x * cos.unsqueeze(1) + half_turned(x) * sin.unsqueeze(1)


def chunked(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), -1) * sin.unsqueeze(1) + cos.unsqueeze(1) * x


def two_dimensional(x, cos, sin):
    return x * cos[0] + half_turned(x) * sin[0]


def turned_backwards(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-low, high), -1) * sin.unsqueeze(1)


def interleaved(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def uneven_halves(x, cos, sin):
    return x * cos.unsqueeze(1) + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin.unsqueeze(1)


@pytest.mark.parametrize(
    ("spelling", "count"),
    [
        (hugging_face, 1),
        (chunked, 1),
        (two_dimensional, 1),
        (turned_backwards, 0),
        (interleaved, 0),
        (uneven_halves, 0),
    ],
)
def test_finds_half_split_rotary_only(spelling, count):
    x = hidden()
    angles = torch.rand(2, x.shape[1], WIDTH, generator=torch.Generator().manual_seed(3))
    args = (x, angles.cos(), angles.sin())
    graph = export(Rotate(spelling), args)
    assert recognise_rotary(graph) == count
    assert torch.allclose(graph(*args), Rotate(spelling)(*args), atol=1e-6, rtol=0)
