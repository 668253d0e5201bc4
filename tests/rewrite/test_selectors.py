"""Selectors of layers and heads: what they mean, and how a wrong one is answered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcompile.errors import MemcompileError
from memcompile.rewrite.selectors import Site, parse_heads, parse_layers

SITES = [Site(layer, f"model.layers.{layer}.self_attn") for layer in range(30)]


def layers(value: Any, sites: list[Site] = SITES) -> list[int]:
    return sorted(parse_layers(value).resolve(sites))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, [7]),
        ("7", [7]),
        ("2-5", [2, 3, 4, 5]),
        ("2 - 4", [2, 3, 4]),
        ("0, 3-4", [0, 3, 4]),
        ([0, "3-4"], [0, 3, 4]),
        ("all", list(range(30))),
        ("every 10", [0, 10, 20]),
        ("every 10 from 5", [5, 15, 25]),
        ({"every": 10}, [0, 10, 20]),
        ({"every": 10, "from": 2}, [2, 12, 22]),
        ([{"every": 15}, 1], [0, 1, 15]),
        ("!2-29", [0, 1]),
        (["0-9", "!5"], [0, 1, 2, 3, 4, 6, 7, 8, 9]),
        (["!5", "4-6"], [4, 6]),
        ("33%-67%", list(range(10, 20))),
        ("0%-10%", [0, 1, 2]),
        ("0%-100%", list(range(30))),
        ("model.layers.3", [3]),
        ("model.layers.3.self_attn", [3]),
        ("*.2?", list(range(20, 30))),
        ("model.layers.[12]", [1, 2]),
        (r"re:layers\.(1|2)\.", [1, 2]),
        (r"!re:layers\.\d\d", list(range(10))),
        ("re:layers[.](1|2)[.],?", [1, 2]),
        ("28-99", [28, 29]),
    ],
)
def test_a_layer_selector_means(value: Any, expected: list[int]) -> None:
    assert layers(value) == expected


def test_shares_of_the_depth_count_layers_that_exist() -> None:
    assert layers("50%-100%", [Site(layer, "") for layer in (1, 5, 9, 13)]) == [9, 13]


@pytest.mark.parametrize(
    ("value", "code", "part"),
    [
        (True, "MC103", "bool"),
        (1.5, "MC103", "float"),
        (None, "MC103", "NoneType"),
        ([[1]], "MC103", "list"),
        ("", "MC104", "empty"),
        ("1,,2", "MC104", "empty"),
        ([], "MC104", "empty"),
        ("!", "MC104", "empty"),
        ("5-2", "MC104", "5-2"),
        (-1, "MC104", "-1"),
        ("2..5", "MC104", "2..5"),
        ("3 4", "MC104", "3 4"),
        ("70%-20%", "MC104", "0%-100%"),
        ("0%-120%", "MC104", "0%-100%"),
        ("every 0", "MC104", "every 0"),
        ({"every": 0}, "MC104", "every 0"),
        ({"every": "4"}, "MC103", "'4'"),
        ({"every": True}, "MC103", "True"),
        ({"evry": 4}, "MC102", "evry"),
        ({"from": 4}, "MC107", "every"),
        ("re:(", "MC104", "regular expression"),
    ],
)
def test_refuses_what_is_not_a_layer_selector(value: Any, code: str, part: str) -> None:
    with pytest.raises(MemcompileError) as caught:
        parse_layers(value, where="plan.yaml:3")
    assert caught.value.code == code
    assert part in caught.value.message
    assert caught.value.where == "plan.yaml:3"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("40-50", "the layers are 0-29; the nearest is 29"),
        (31, "the nearest is 29"),
        ("0, 44", "the nearest is 29"),
        ("!44", "the nearest is 29"),
        ("every 4 from 90", "the nearest is 29"),
        ("model.layer.3.self_attn", "model.layers.3.self_attn"),
        ("re:model.lyers", "model.layers"),
        ("decoder*", "the nearest names are"),
    ],
)
def test_a_selector_that_matches_nothing_names_the_nearest(value: Any, nearest: str) -> None:
    with pytest.raises(MemcompileError, match="MC301") as caught:
        parse_layers(value, where="plan.yaml:3").resolve(SITES)
    assert nearest in (caught.value.fix or "")
    assert caught.value.exit_code == 4
    assert caught.value.where == "plan.yaml:3"


def test_refuses_a_selector_that_takes_everything_away_again() -> None:
    with pytest.raises(MemcompileError, match=r"MC301 layers: .* excluded again"):
        layers(["3", "!3"])


def test_says_that_a_model_has_no_attention_layers() -> None:
    with pytest.raises(MemcompileError, match="no attention layer was recognised"):
        layers(3, [])


@given(st.lists(st.integers(0, 29), min_size=1, max_size=8))
def test_numbers_select_themselves(numbers: list[int]) -> None:
    assert layers(numbers) == sorted(set(numbers))
    assert layers(", ".join(map(str, numbers))) == sorted(set(numbers))


@given(st.sets(st.integers(0, 29), min_size=1, max_size=29))
def test_negation_is_the_complement(numbers: set[int]) -> None:
    assert set(layers([f"!{number}" for number in numbers])) == set(range(30)) - numbers


@pytest.mark.parametrize(
    ("value", "layer", "expected"),
    [
        (0, 0, (0,)),
        ([0, 2], 5, (0, 2)),
        ("0-1", 5, (0, 1)),
        ("!0", 5, (1, 2)),
        ({"kv": [1]}, 5, (1,)),
        ({"query": "3-5"}, 5, (1,)),
        ({"query": [0, 1, 2, 6, 7, 8]}, 5, (0, 2)),
        ({"0-3": [0], "4-9": {"query": "3-8"}}, 2, (0,)),
        ({"0-3": [0], "4-9": {"query": "3-8"}}, 4, (1, 2)),
        ({"0-3": [0], 2: [1]}, 2, (0, 1)),
        ({"0-3": [0]}, 9, ()),
    ],
)
def test_a_head_selector_means(value: Any, layer: int, expected: tuple[int, ...]) -> None:
    assert parse_heads(value).resolve(layer, SITES, heads=9, kv_heads=3) == expected


def test_query_heads_that_split_a_group_are_refused_with_the_group() -> None:
    reason = parse_heads({"query": [0, 1]}).resolve(0, SITES, heads=9, kv_heads=3)
    assert isinstance(reason, str)
    assert "query heads 0-2 share key/value head 0" in reason
    assert "only 0, 1 of them" in reason


def test_heads_beyond_the_layer_are_refused_with_the_number() -> None:
    assert parse_heads(3).resolve(0, SITES, 9, 3) == "has 3 key/value heads (0-2), so head 3 does not exist"
    reason = parse_heads({"query": 9}).resolve(0, SITES, 9, 3)
    assert reason == "has 9 query heads (0-8), so head 9 does not exist"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (True, "MC103"),
        ([1.5], "MC103"),
        ("a", "MC104"),
        ("", "MC104"),
        ([], "MC104"),
        ({}, "MC104"),
        ("2-1", "MC104"),
        ({"query": [0], "kv": [1]}, "MC102"),
        ({"0-3": {"keys": [0]}}, "MC102"),
        ({"0..3": [0]}, "MC104"),
    ],
)
def test_refuses_what_is_not_a_head_selector(value: Any, code: str) -> None:
    with pytest.raises(MemcompileError) as caught:
        parse_heads(value, where="plan.yaml:3")
    assert caught.value.code == code
    assert caught.value.where == "plan.yaml:3"


def test_a_selector_reads_back_as_it_was_written() -> None:
    assert str(parse_layers(["2-29", "!5"])) == "[2-29, !5]"
    assert str(parse_layers({"every": 4, "from": 2})) == "{every: 4, from: 2}"
    assert str(parse_heads({"0-3": [0, 1]})) == "{0-3: [0, 1]}"
    parsed = parse_layers("2-29")
    assert parse_layers(parsed) is parsed
