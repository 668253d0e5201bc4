"""Any plan, resolved and written as YAML, reads back as itself."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from memcompile.plan import load_plan
from memcompile.plan.units import format_bytes, parse_bytes, parse_share
from tests.plan.library import FakeLibrary

positive = st.integers(1, 10**9)
amounts = st.floats(0.001, 1e6, allow_nan=False)
layers = st.one_of(
    st.integers(0, 9),
    st.sampled_from(["0-9", "33%-67%", "model.layers.*", "!0", "every 4 from 2"]),
    st.just({"every": 3, "from": 1}),
)
common = {"layers": layers, "expect": positive}
evict = st.fixed_dictionaries(
    {},
    optional=common
    | {
        "preset": st.sampled_from(["snapkv", "knorm"]),
        "scorer": st.sampled_from(["snapkv", "knorm"]),
        "observe_tokens": positive,
        "pools": st.lists(positive, max_size=3),
        "heads": st.lists(st.integers(0, 7), min_size=1, max_size=3),
    },
)
budget = st.one_of(
    st.fixed_dictionaries({"keep_tokens": positive}),
    st.fixed_dictionaries({"keep_fraction": st.floats(0.001, 1)}),
    # or a preset that brings one
    st.fixed_dictionaries({"preset": st.sampled_from(["snapkv", "knorm"])}),
)
quantize = st.fixed_dictionaries({}, optional=common | {"bits": st.sampled_from([0, 4, 8])})
passes = st.tuples(
    st.lists(st.builds(lambda e, b: {"kv.evict": e | b}, evict, budget), max_size=1),
    st.lists(st.builds(lambda q: {"kv.quantize": q}, quantize), max_size=1),
).map(lambda pair: pair[0] + pair[1])
gates = st.fixed_dictionaries(
    {},
    optional={
        "passkey": st.fixed_dictionaries({"min_accuracy": st.floats(0, 1) | st.sampled_from(["90%", "0%"])}),
        "state_bytes": st.fixed_dictionaries({"max": positive | st.sampled_from(["24MiB", "1.5GB"])}),
        "decode_speedup": st.fixed_dictionaries({"min": amounts}),
    },
)
plans = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional={
        "model": st.fixed_dictionaries(
            {"source": st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1)}
        ),
        "target": st.fixed_dictionaries({"threads": st.integers(1, 64)}),
        "workload": st.fixed_dictionaries({}, optional={"prompt_tokens": positive, "batch": positive}),
        "passes": passes,
        "gates": gates,
    },
)


# no deadline: a busy machine is slow now and then; fewer examples, as writing YAML takes a tenth of a second
@settings(deadline=None, max_examples=40)
@given(plans)
def test_any_resolved_plan_round_trips_through_yaml(written: dict[str, Any]) -> None:
    resolved = load_plan(written, library=FakeLibrary()).resolved()
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(resolved, text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.yaml")
        path.write_text(text.getvalue(), encoding="utf-8")
        again = load_plan(path, library=FakeLibrary())
    assert again.resolved() == resolved
    assert json.loads(json.dumps(resolved)) == resolved


@given(st.integers(0, 2**50))
def test_sizes_are_read_as_they_are_written(count: int) -> None:
    # four significant digits are written
    assert abs(parse_bytes(format_bytes(count)) - count) <= count * 5e-4 + 1


@given(st.floats(0, 1e6, allow_nan=False))
def test_a_share_and_a_percentage_are_the_same_number(share: float) -> None:
    assert abs(parse_share(f"{share * 100!r}%") - share) <= 1e-12 * max(1.0, share)
