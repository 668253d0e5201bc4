from __future__ import annotations

from pathlib import Path

import pytest

from memcompile.plan import load_plan

PLANS = sorted((Path(__file__).resolve().parents[2] / "examples" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_valid_and_its_texts_are_there(path: Path) -> None:
    plan = load_plan(path)
    assert plan.data.calibration is not None
    assert plan.data.evaluation is not None
    # scales fitted to the text they are judged on would flatter
    assert plan.text_path(plan.data.calibration) != plan.text_path(plan.data.evaluation)
    assert load_plan(plan.resolved()).resolved() == plan.resolved()


def test_the_shipped_plans_are_the_ones_the_documentation_names() -> None:
    assert {path.stem for path in PLANS} >= {"dense", "streaming", "snapkv-int8", "mixed", "demo"}
