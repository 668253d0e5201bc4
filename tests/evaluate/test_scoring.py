"""Losses and divergences agree with their definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memcompile.evaluate import scoring


def _logits(rows: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * 5).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 65])
def test_log_probabilities_are_log_softmax(rows: int) -> None:
    logits = _logits(rows, 200)
    wide = logits.astype(np.float64)
    expected = (
        wide
        - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
        - wide.max(1, keepdims=True)
    )
    assert np.abs(scoring.log_probabilities(logits) - expected).max() < 1e-5


def test_log_probabilities_survive_large_logits() -> None:
    log_probs = scoring.log_probabilities(np.array([[1e4, 0.0, -1e4]], dtype=np.float32))
    assert np.isfinite(log_probs).all()
    assert log_probs[0, 0] == 0.0


def test_divergence_of_a_model_from_itself_is_zero() -> None:
    log_probs = scoring.log_probabilities(_logits(7, 300))
    assert np.abs(scoring.kl_divergence(log_probs, log_probs)).max() == 0.0


@pytest.mark.parametrize("vocabulary", [5, 16384, 16385])
def test_divergence_is_its_definition_over_every_chunk(vocabulary: int) -> None:
    p = scoring.log_probabilities(_logits(3, vocabulary, seed=1))
    q = scoring.log_probabilities(_logits(3, vocabulary, seed=2))
    wide = p.astype(np.float64)
    expected = (np.exp(wide) * (wide - q.astype(np.float64))).sum(1)
    assert np.abs(scoring.kl_divergence(p, q) - expected).max() < 1e-9


def test_divergence_ignores_tokens_the_original_rules_out() -> None:
    p = np.array([[0.0, -np.inf]])
    q = np.array([[math.log(0.5), math.log(0.5)]])
    with np.errstate(invalid="ignore"):
        assert scoring.kl_divergence(p, q)[0] == pytest.approx(math.log(2), abs=1e-12)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    log_probs = scoring.log_probabilities(np.zeros((10, 50), dtype=np.float32))
    summary = scoring.summarise(scoring.token_losses(log_probs, np.arange(10)))
    assert summary.perplexity == pytest.approx(50, rel=1e-6)
    assert summary.count == 10


def test_standard_error_shrinks_with_the_root_of_the_count() -> None:
    losses = np.random.default_rng(0).standard_normal(400) + 3
    assert scoring.summarise(losses).nll_stderr == pytest.approx(losses.std(ddof=1) / 20, rel=1e-12)


def test_no_positions_give_no_perplexity() -> None:
    assert math.isnan(scoring.summarise(np.empty(0)).perplexity)
