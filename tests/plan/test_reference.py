from __future__ import annotations

from memcompile.plan.reference import options_markdown, plan_reference_markdown
from memcompile.plan.schema import Data, Gates, Model, Target, Text, Workload
from tests.plan.library import EvictConfig


def test_every_key_of_every_section_has_a_row_with_a_meaning() -> None:
    rows = [line for line in plan_reference_markdown().splitlines() if line.startswith("| `")]
    for section in (Model, Target, Workload, Data, Text):
        for key in section.model_fields:
            assert any(row.startswith(f"| `{key}` |") for row in rows), key
    for gate in Gates.model_fields:
        assert any(row.startswith(f"| `{gate}.") for row in rows), gate
    assert all(row.split("|")[-2].strip() for row in rows)


def test_types_and_ranges_come_from_the_models() -> None:
    text = plan_reference_markdown()
    assert "| `passkey.min_accuracy` | share ≥ 0, ≤ 1 |" in text
    assert "| `state_bytes.max` | size ≥ 0 |" in text
    assert "| `dtype` | `float32`, `float16`, `bfloat16` | `float32` |" in text


def test_options_of_a_pass_are_a_table_too() -> None:
    assert "| `keep_tokens` | whole number ≥ 1 |  | tokens kept by each head |" in options_markdown(
        EvictConfig
    )
