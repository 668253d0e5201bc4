"""What a state allocates, documented slot by slot, and that it is never exceeded."""

from __future__ import annotations

import numpy as np
import pytest

from memcompile.errors import MemcompileError
from memcompile.runtime.cache import State
from memcompile.runtime.session import Session
from memcompile.runtime.slots import DECODE_SLACK_TOKENS
from tests.runtime.conftest import OpenTiny
from tests.runtime.test_split_law import assert_near, tokens_of
from tests.runtime.tiny_artifact import Layer, TinyModel, reference

# of TinyModel: 2 key/value heads of width 8, keys and values
SLOT_ELEMENTS = 2 * 2 * 8


def slots(state: State, group: int = 0) -> int:
    return state.tables[state.manifest.groups[group].name].slots


def test_a_full_group_holds_the_prompt_and_the_new_tokens(open_tiny: OpenTiny) -> None:
    session = open_tiny(TinyModel())
    state = session.new_state(3, 50, 20)
    assert state.nbytes == 3 * 2 * (50 + 20) * SLOT_ELEMENTS * 4


@pytest.mark.parametrize(("bits", "size"), [(8, 1.0), (4, 0.5)])
def test_a_quantised_cache_takes_its_bits(open_tiny: OpenTiny, bits: int, size: float) -> None:
    session = open_tiny(TinyModel(layers=(Layer(bits=bits), Layer(bits=bits))))
    assert session.new_state(1, 50, 20).nbytes == 2 * 70 * SLOT_ELEMENTS * size


def test_a_window_holds_sinks_window_and_a_chunk_then_64_instead(open_tiny: OpenTiny) -> None:
    model = TinyModel(layers=(Layer(window=10, sinks=3), Layer(window=10, sinks=3)), chunk_tokens=100)
    session = open_tiny(model)
    state = session.new_state(1, 200, 50)
    assert slots(state) == 3 + 10 + 100
    assert state.nbytes == 2 * 113 * SLOT_ELEMENTS * 4
    session.prefill(state, [tokens_of(model, 200)])
    assert slots(state) == 3 + 10 + DECODE_SLACK_TOKENS
    assert state.nbytes == 2 * 77 * SLOT_ELEMENTS * 4


@pytest.mark.parametrize("prompt", [1, 5, 12, 13, 14])
def test_a_prompt_inside_the_window_takes_no_more_than_itself(open_tiny: OpenTiny, prompt: int) -> None:
    model = TinyModel(layers=(Layer(window=10, sinks=3), Layer(window=10, sinks=3)))
    session = open_tiny(model)
    state = session.new_state(1, prompt, 6)
    assert slots(state) == prompt + 6
    tokens = tokens_of(model, prompt + 6)
    got = [*session.prefill(state, [tokens[:prompt]]), session.extend(state, tokens[prompt:])]
    assert_near(np.concatenate(got), reference(model, tokens)[prompt - 1 :])


def test_state_of_a_window_does_not_grow_with_the_prompt(open_tiny: OpenTiny) -> None:
    model = TinyModel(layers=(Layer(window=10, sinks=3), Layer(window=10, sinks=3)), chunk_tokens=16)
    session = open_tiny(model)
    sizes = set()
    for prompt in (100, 150, 200):
        state = session.new_state(1, prompt, 50)
        session.prefill(state, [tokens_of(model, prompt)])
        sizes.add(state.nbytes)
    assert len(sizes) == 1


def test_an_evicted_group_holds_the_kept_and_the_new_tokens(open_tiny: OpenTiny) -> None:
    model = TinyModel(layers=(Layer(keep_tokens=12), Layer(keep_tokens=12)))
    session = open_tiny(model)
    state = session.new_state(1, 100, 20)
    observed = 2 * 2 * 4 * 4 * 8 * 4  # layers, two buffers, heads, queries, width, bytes
    assert state.nbytes == 2 * 100 * SLOT_ELEMENTS * 4 + observed
    session.prefill(state, [tokens_of(model, 100)])
    session.compress(state)
    assert slots(state) == 12 + 20
    assert state.nbytes == 2 * 32 * SLOT_ELEMENTS * 4


def test_a_short_prompt_keeps_all_it_has(open_tiny: OpenTiny) -> None:
    model = TinyModel(layers=(Layer(keep_tokens=12), Layer()))
    session = open_tiny(model)
    tokens = tokens_of(model, 20)
    state = session.new_state(1, 7, 13)
    session.prefill(state, [tokens[:7]])
    session.compress(state)
    assert slots(state) == 7 + 13
    assert_near(session.extend(state, tokens[7:]), reference(model, tokens)[7:])


def test_more_tokens_than_the_state_was_made_for_are_refused(open_tiny: OpenTiny) -> None:
    session = open_tiny(TinyModel())
    state = session.new_state(1, 5, 2)
    session.prefill(state, [[1, 2, 3]])
    session.extend(state, [4, 5])
    with pytest.raises(
        MemcompileError, match="MC120 the state was made for 2 new tokens: 2 were taken, 1 more"
    ):
        session.decode(state, [6])


def test_what_is_decoded_copies_no_cache(open_tiny: OpenTiny) -> None:
    session = open_tiny(TinyModel(layers=(Layer(window=10, sinks=3), Layer())))
    state = session.new_state(1, 40, 40)
    session.prefill(state, [tokens_of(TinyModel(), 40)])
    session.decode(state, [1])
    before = [_addresses(state), state.generation]
    for token in range(30):
        session.decode(state, [token])
    assert before == [_addresses(state), state.generation]
    full = next(c for c in state.caches if c.entry.group == "full")
    assert np.abs(full.key.row(0)[:, :71]).min(axis=(0, 2)).max() > 0  # every slot up to the last is written
    assert not full.key.row(0)[:, 71:].any()


def _addresses(state: State) -> list[int]:
    return [c.key.array.ctypes.data for c in state.caches]  # type: ignore[attr-defined]


def test_order_of_calls_is_checked(open_tiny: OpenTiny) -> None:
    session: Session = open_tiny(TinyModel(layers=(Layer(keep_tokens=12), Layer())))
    state = session.new_state(1, 5, 5)
    with pytest.raises(MemcompileError, match="MC120 a state must be prefilled before it decodes"):
        session.decode(state, [1])
    with pytest.raises(MemcompileError, match="MC120 compress comes after prefill"):
        session.compress(state)
    session.prefill(state, [[1, 2, 3]])
    with pytest.raises(MemcompileError, match="MC120 this state has been prefilled already"):
        session.prefill(state, [[1]])
    session.decode(state, [4])
    with pytest.raises(MemcompileError, match="MC120 compress comes after prefill and before the first"):
        session.compress(state)
