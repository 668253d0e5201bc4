"""Greedy, temperature, top-k, top-p, seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcompile.errors import MemcompileError
from memcompile.runtime.sampling import Sampler, Sampling, candidates

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def drawn(sampling: Sampling, count: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=5) / count


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert Sampler(Sampling())(LOGITS) == 1
    assert Sampler(Sampling())(np.array([0.0, 2.0, 2.0])) == 1
    assert Sampler(Sampling(temperature=5.0, top_k=1))(LOGITS) == 1


def test_temperature_one_draws_by_probability() -> None:
    np.testing.assert_allclose(drawn(Sampling(temperature=1.0)), np.exp(LOGITS), atol=0.03)


def test_a_low_temperature_sharpens() -> None:
    wanted = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    np.testing.assert_allclose(drawn(Sampling(temperature=0.5)), wanted, atol=0.03)


def test_top_k_draws_from_the_likeliest() -> None:
    ids, probabilities = candidates(LOGITS, Sampling(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 3]
    np.testing.assert_allclose(probabilities, [4 / 7, 3 / 7], rtol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "wanted"), [(0.39, [1]), (0.41, [1, 3]), (0.71, [1, 3, 4]), (1.0, [1, 3, 4, 0, 2])]
)
def test_top_p_takes_the_shortest_list_with_that_mass(top_p: float, wanted: list[int]) -> None:
    assert candidates(LOGITS, Sampling(temperature=1.0, top_p=top_p))[0].tolist() == wanted


def test_equal_seeds_give_equal_tokens_and_rows_differ() -> None:
    def tokens(seed: int, row: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), row)
        return [sampler(LOGITS) for _ in range(40)]

    assert tokens(3, 0) == tokens(3, 0)
    assert tokens(3, 0) != tokens(4, 0)
    assert tokens(3, 0) != tokens(3, 1)


@given(
    st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=20),
    st.floats(0.01, 10),
    st.integers(0, 25),
    st.floats(0.01, 1),
)
def test_candidates_are_a_distribution_over_the_likeliest(
    values: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.array(values, np.float32)
    ids, probabilities = candidates(logits, Sampling(temperature, top_k, top_p))
    assert abs(probabilities.sum() - 1) < 1e-9
    assert (np.diff(probabilities) <= 1e-12).all()
    assert len(ids) <= (top_k or len(values))
    rest = np.delete(logits, ids)
    assert not len(rest) or rest.max() <= logits[ids].min()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_refuses_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(MemcompileError, match=f"MC120 {name} is {value}, it must be") as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.where == f"sampling.{name}"


def test_refuses_logits_that_are_not_numbers() -> None:
    with pytest.raises(MemcompileError, match="MC901 the model gave logits that are not numbers"):
        Sampler(Sampling())(np.array([0.0, np.nan]))
