"""Bits are lowered where a byte costs least."""

from __future__ import annotations

import pytest

from memcompile.weights.mixed import Option, allocate

OPTIONS = {
    "cheap": (Option(8, 100, 0.0), Option(4, 60, 0.1)),
    "dear": (Option(8, 100, 0.0), Option(4, 60, 5.0)),
    "large": (Option(8, 1000, 0.1), Option(4, 600, 0.6)),
}


@pytest.mark.parametrize(
    ("max_bytes", "bits"),
    [
        (1200, {"cheap": 8, "dear": 8, "large": 8}),
        # the large one is cheaper for a byte, and would lose more than is needed
        (1199, {"cheap": 4, "dear": 8, "large": 8}),
        (799, {"cheap": 4, "dear": 8, "large": 4}),
        (720, {"cheap": 4, "dear": 4, "large": 4}),
        (1, {"cheap": 4, "dear": 4, "large": 4}),
    ],
)
def test_a_budget_of_bytes(max_bytes: int, bits: dict[str, int]) -> None:
    found = allocate(OPTIONS, max_bytes=max_bytes)
    assert found.bits == bits
    assert found.nbytes == sum(
        next(option.nbytes for option in OPTIONS[name] if option.bits == given)
        for name, given in bits.items()
    )


@pytest.mark.parametrize(
    ("max_loss", "bits"),
    [
        (0.0, {"cheap": 8, "dear": 8, "large": 8}),
        # the large one would lose too much: the next one still fits
        (0.3, {"cheap": 4, "dear": 8, "large": 8}),
        (0.7, {"cheap": 4, "dear": 8, "large": 4}),
        (9.0, {"cheap": 4, "dear": 4, "large": 4}),
    ],
)
def test_a_budget_of_loss(max_loss: float, bits: dict[str, int]) -> None:
    found = allocate(OPTIONS, max_loss=max_loss)
    assert found.bits == bits
    assert found.loss <= max(max_loss, 0.1)


def test_bits_that_save_nothing_are_not_lowered_first() -> None:
    options = {
        "same": (Option(8, 10, 0.0), Option(4, 10, 0.0)),
        "other": (Option(8, 10, 0.0), Option(4, 5, 1.0)),
    }
    assert allocate(options, max_bytes=15).bits == {"same": 8, "other": 4}


def test_a_large_weight_is_not_lowered_for_a_few_bytes() -> None:
    options = {"table": (Option(8, 1000, 0.0), Option(4, 600, 1.0))} | {
        f"layer {index}": (Option(8, 100, 0.0), Option(4, 60, 0.05 + index / 100)) for index in range(10)
    }
    found = allocate(options, max_bytes=1700)
    assert found.bits["table"] == 8
    assert [found.bits[f"layer {index}"] for index in range(10)] == [4] * 8 + [8] * 2


def test_what_a_large_weight_saves_too_much_is_given_back() -> None:
    options = {
        "table": (Option(8, 1000, 0.0), Option(4, 600, 0.3)),
        "one": (Option(8, 100, 0.0), Option(4, 60, 0.01)),
        "other": (Option(8, 100, 0.0), Option(4, 60, 0.02)),
    }
    assert allocate(options, max_bytes=1000).bits == {"table": 4, "one": 8, "other": 8}
