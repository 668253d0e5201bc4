"""prefill(a + b) == prefill(a) then extend or decode (b), and both are the model in float64."""

from __future__ import annotations

import numpy as np
import pytest

from memcompile.runtime.session import Session
from tests.runtime.conftest import OpenTiny
from tests.runtime.tiny_artifact import Array, Layer, TinyModel, reference

TOKENS = 90
# float32 against float64, logits of size 5
TOLERANCE = 2e-5

CACHES = {
    "full": (Layer(), Layer()),
    "window": (Layer(window=10), Layer(window=10)),
    "window_and_sinks": (Layer(window=10, sinks=3), Layer()),
    "window_of_one": (Layer(window=1, sinks=1), Layer(window=1)),
    "window_beyond_the_text": (Layer(window=200, sinks=4), Layer()),
    "strided_blocks": (Layer(window=9, sinks=2, block=2, stride=5), Layer(window=6, block=4, stride=3)),
    "int8": (Layer(bits=8), Layer(window=10, sinks=3, bits=8)),
    "int4": (Layer(bits=4), Layer(window=10, sinks=3, bits=4)),
    "evicted_but_not_compressed": (Layer(keep_tokens=200), Layer()),
}


def tokens_of(model: TinyModel, count: int, seed: int = 1) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, model.vocab, count)]


def assert_near(got: Array, wanted: Array) -> None:
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=CACHES)
def case(request: pytest.FixtureRequest, open_tiny: OpenTiny) -> tuple[Session, list[int], Array]:
    model = TinyModel(layers=CACHES[request.param])
    tokens = tokens_of(model, TOKENS)
    return open_tiny(model), tokens, reference(model, tokens)


@pytest.mark.parametrize("prompt", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 89])
def test_extending_continues_the_prompt(case: tuple[Session, list[int], Array], prompt: int) -> None:
    session, tokens, wanted = case
    state = session.new_state(1, prompt, TOKENS - prompt)
    first = session.prefill(state, [tokens[:prompt]], all_logits=True)[0]
    assert_near(first, wanted[:prompt])
    assert_near(session.extend(state, tokens[prompt:]), wanted[prompt:])


@pytest.mark.parametrize("prompt", [1, 16, 17, 40])
def test_decoding_continues_the_prompt(case: tuple[Session, list[int], Array], prompt: int) -> None:
    session, tokens, wanted = case
    state = session.new_state(1, prompt, TOKENS - prompt)
    assert_near(session.prefill(state, [tokens[:prompt]])[0], wanted[prompt - 1 : prompt])
    got = np.concatenate([session.decode(state, [token]) for token in tokens[prompt:]])
    assert_near(got, wanted[prompt:])


def test_rows_of_different_lengths_are_what_they_are_alone(case: tuple[Session, list[int], Array]) -> None:
    session, _, _ = case
    layers = tuple(CACHES[k] for k in CACHES if CACHES[k][0].group == session.manifest.groups[0])
    model = next(m for m in (TinyModel(layers=c) for c in layers) if _same(m, session))
    rows = [tokens_of(model, count, seed=count) for count in (80, 45, 71)]
    prompts = [40, 5, 31]
    state = session.new_state(3, 40, 40)
    first = session.prefill(state, [row[:n] for row, n in zip(rows, prompts, strict=True)])
    wanted = [reference(model, row) for row in rows]
    for row in range(3):
        assert_near(first[row], wanted[row][prompts[row] - 1 : prompts[row]])
    for step in range(40):
        got = session.decode(state, [row[n + step] for row, n in zip(rows, prompts, strict=True)])
        for row in range(3):
            assert_near(got[row], wanted[row][prompts[row] + step])


def _same(model: TinyModel, session: Session) -> bool:
    groups = tuple(dict.fromkeys(layer.group for layer in model.layers))
    bits = [layer.bits for layer in model.layers]
    return groups == session.manifest.groups and bits == [s.bits for s in session.manifest.states]


def test_mixing_decode_and_extend_is_one_sequence(case: tuple[Session, list[int], Array]) -> None:
    session, tokens, wanted = case
    state = session.new_state(1, 20, 70)
    session.prefill(state, [tokens[:20]])
    got = [session.decode(state, tokens[20:21]), session.extend(state, tokens[21:60])]
    got += [session.decode(state, tokens[60:61]), session.extend(state, tokens[61:90])]
    assert_near(np.concatenate(got), wanted[20:])


def test_logits_handed_over_chunk_by_chunk_are_the_same(case: tuple[Session, list[int], Array]) -> None:
    session, tokens, wanted = case
    state = session.new_state(1, 50, 0)
    chunks: list[tuple[int, int, Array]] = []
    left = session.prefill(state, [tokens[:50]], on_logits=lambda *chunk: chunks.append(chunk))
    assert left == []
    assert [start for _, start, _ in chunks] == [0, 16, 32, 48]
    assert_near(np.concatenate([values for _, _, values in chunks]), wanted[:50])


def test_two_states_take_turns_without_disturbing_each_other(
    case: tuple[Session, list[int], Array],
) -> None:
    session, tokens, wanted = case
    states = [session.new_state(1, 30, 40) for _ in range(2)]
    for state, start in zip(states, (0, 0), strict=True):
        session.prefill(state, [tokens[start : start + 30]])
    for step in range(30, 60):
        for state in states:
            assert_near(session.decode(state, tokens[step : step + 1])[0], wanted[step])
