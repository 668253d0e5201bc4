"""Feed-forward layers over some of their neurons, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from memcompile.dialect import sparse_ffn
from memcompile.dialect.ffn import (
    ACTIVATIONS,
    COUNT_EVERY,
    kernel_ffn,
    largest_neurons,
    neuron_counts_definition,
    sparse_ffn_definition,
)
from memcompile.kernels import KernelLibrary

# model width, neurons: below, at and above whole vectors and groups of neurons
SIZES = ((1, 1), (13, 37), (16, 64), (65, 63), (200, 129))


def make(width: int, neurons: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(width * neurons)
    x = torch.randn(2, 1, width, generator=generator)
    weights = [torch.randn(neurons, width, generator=generator) * width**-0.5 for _ in range(3)]
    counts = torch.randint(0, 9, (2, neurons), generator=generator).float()
    # a row that nothing was counted for
    counts[1] = 0
    return x, weights, counts


@pytest.mark.parametrize("counted", [False, True], ids=["of the token", "of the prompt"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_computes_what_the_definition_chooses(
    library: KernelLibrary, activation: str, counted: bool
) -> None:
    for width, neurons in SIZES:
        x, weights, counts = make(width, neurons)
        for keep in {1, max(1, neurons // 3), neurons}:
            given = counts if counted else None
            expected = sparse_ffn_definition(
                x.double(), *(w.double() for w in weights), None if given is None else given.double(),
                activation=activation, keep=keep, choosing=True,
            )  # fmt: skip
            for threads in (1, 2):
                out = kernel_ffn(x, *weights, given, activation=activation, keep=keep, threads=threads)
                assert out is not None
                torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_extreme_inputs_stay_finite(library: KernelLibrary) -> None:
    _, weights, _ = make(65, 63)
    x = torch.full((1, 1, 65), 1e4)
    for activation in ACTIVATIONS:
        out = kernel_ffn(x, *weights, None, activation=activation, keep=20)
        assert out is not None
        assert torch.isfinite(out).all()
        expected = sparse_ffn_definition(
            x.double(), *(w.double() for w in weights), activation=activation, keep=20, choosing=True
        )
        # sums of such numbers cancel: what is lost is a share of the largest
        torch.testing.assert_close(out.double(), expected, atol=1e-6 * float(expected.abs().max()), rtol=0)


def test_sizes_that_make_no_sense_are_refused(library: KernelLibrary) -> None:
    x, weights, _ = make(13, 37)
    with pytest.raises(ValueError, match="sizes or types"):
        kernel_ffn(x, *weights, None, activation="silu", keep=0)


def test_only_a_call_of_one_token_that_chooses_leaves_neurons_out() -> None:
    x, weights, _ = make(65, 63)
    whole = sparse_ffn(x, *weights, activation="silu", keep=5)
    chosen = sparse_ffn(x, *weights, activation="silu", keep=5, choosing=True)
    assert (whole - chosen).abs().max() > 1e-2
    several = torch.cat((x, x), dim=1)
    both = sparse_ffn(several, *weights, activation="silu", keep=5, choosing=True)
    torch.testing.assert_close(both[:, :1], whole, atol=1e-5, rtol=0)


def test_of_equal_neurons_the_first_are_taken() -> None:
    assert largest_neurons(torch.tensor([1.0, 3, 1, 3, 1]), 3).tolist() == [True, True, False, True, False]
    assert largest_neurons(torch.ones(3), 7).all()


def test_every_eighth_token_of_a_prompt_is_counted_and_padding_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    x, gate = torch.randn(2, 20, 16, generator=generator), torch.randn(40, 16, generator=generator)
    positions = torch.arange(20).repeat(2, 1)
    positions[1, 9:] = -1
    counts = neuron_counts_definition(
        x, gate, torch.zeros(2, 40), positions, activation="relu", token_keep=10
    )
    active = torch.relu(x[:, ::COUNT_EVERY] @ gate.T)
    assert active.shape[1] == 3
    # at most ten a token, and none that is at rest
    assert counts[0].tolist() == sum(largest_neurons(a, 10) & (a > 0) for a in active[0]).tolist()
    assert counts[1].sum() <= 20
    # a decoded token changes nothing
    again = neuron_counts_definition(x[:, :1], gate, counts, positions, activation="relu", token_keep=10)
    assert torch.equal(again, counts)
