"""Eviction after prefill: what compress keeps is what decoding sees, at true positions."""

from __future__ import annotations

import numpy as np
import pytest

from memcompile.artifact import GroupEntry
from memcompile.runtime.cache import State
from memcompile.runtime.session import Session
from tests.runtime.conftest import OpenTiny
from tests.runtime.test_split_law import assert_near, tokens_of
from tests.runtime.tiny_artifact import Array, Layer, TinyModel, reference

KEEP = 12
CASES = {
    "one_layer": (Layer(keep_tokens=KEEP), Layer()),
    "with_a_window": (Layer(keep_tokens=KEEP), Layer(window=10, sinks=3)),
    "int8": (Layer(keep_tokens=KEEP, bits=8), Layer(window=10, sinks=3, bits=8)),
    "int4": (Layer(keep_tokens=KEEP, bits=4), Layer(bits=4)),
    "two_groups": (Layer(keep_tokens=KEEP), Layer(keep_tokens=20)),
}


def kept_positions(before: list[Array], state: State) -> dict[int, Array]:
    """Which of the prompt's keys each evicted layer holds now: {layer: positions [G,n]}, found by value."""
    found = {}
    for layer, (old, caches) in enumerate(zip(before, state.caches, strict=True)):
        group: GroupEntry = state.manifest.group(caches.entry.group)
        if group.evict is None:
            continue
        count = int(state.tables[group.name].used[0])
        new = caches.key.row(0)[:, :count]
        places = []
        for head in range(new.shape[0]):
            same = (new[head][:, None] == old[head][None]).all(-1)
            assert (same.sum(1) >= 1).all(), "a kept key is not one of the prompt's"
            places.append(same.argmax(1))
        found[layer] = np.stack(places)
    return found


@pytest.mark.parametrize("name", CASES)
def test_decoding_sees_the_kept_tokens_and_the_new_ones(open_tiny: OpenTiny, name: str) -> None:
    model = TinyModel(layers=CASES[name])
    session: Session = open_tiny(model)
    tokens = tokens_of(model, 70)
    state = session.new_state(1, 50, 20)
    assert_near(session.prefill(state, [tokens[:50]])[0], reference(model, tokens)[49:50])
    before = [c.key.row(0)[:, :50].copy() for c in state.caches]
    session.compress(state)
    kept = kept_positions(before, state)
    assert all(places.shape == (2, model.layers[layer].keep_tokens) for layer, places in kept.items())
    assert all((np.diff(places) > 0).all() for places in kept.values())
    wanted = reference(model, tokens, kept={layer: (50, places) for layer, places in kept.items()})
    assert_near(session.extend(state, tokens[50:65]), wanted[50:65])
    assert_near(session.decode(state, tokens[65:66])[0], wanted[65])
    assert np.abs(wanted[50:] - reference(model, tokens)[50:]).max() > 0.01  # something was lost


def test_rows_of_different_lengths_are_compressed_as_alone(open_tiny: OpenTiny) -> None:
    model = TinyModel(layers=CASES["with_a_window"])
    session = open_tiny(model)
    rows = [tokens_of(model, 60, seed=seed) for seed in range(3)]
    prompts = [50, 7, 23]
    state = session.new_state(3, 50, 10)
    session.prefill(state, [row[:n] for row, n in zip(rows, prompts, strict=True)])
    session.compress(state)
    got = np.stack(
        [session.decode(state, [r[n + i] for r, n in zip(rows, prompts, strict=True)]) for i in range(9)]
    )
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = session.new_state(1, prompt, 10)
        session.prefill(alone, [row[:prompt]])
        session.compress(alone)
        assert_near(got[:, index], session.extend(alone, row[prompt : prompt + 9]))


def test_the_observed_queries_span_chunks(open_tiny: OpenTiny) -> None:
    """The last chunk has one token; the four observed queries come from it and the chunk before."""
    model = TinyModel(layers=(Layer(keep_tokens=KEEP), Layer()), chunk_tokens=16)
    whole = TinyModel(layers=(Layer(keep_tokens=KEEP), Layer()), chunk_tokens=64)
    tokens = tokens_of(model, 33)
    seen = []
    for session in (open_tiny(model), open_tiny(whole)):
        state = session.new_state(1, 33, 1)
        session.prefill(state, [tokens])
        seen.append(state.caches[0].observed.row(0).copy())  # type: ignore[union-attr]
    assert np.abs(seen[0]).min() > 0
    assert_near(seen[0], seen[1])


def test_compressing_twice_changes_nothing(open_tiny: OpenTiny) -> None:
    model = TinyModel(layers=CASES["one_layer"])
    session = open_tiny(model)
    state = session.new_state(1, 50, 5)
    session.prefill(state, [tokens_of(model, 50)])
    session.compress(state)
    key = state.caches[0].key.row(0).copy()
    session.compress(state)
    assert (state.caches[0].key.row(0) == key).all()
