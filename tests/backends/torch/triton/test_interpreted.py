"""The Triton kernels against `memcompile::attention`'s definition in float64, in Triton's interpreter.

Nothing here runs on a GPU: the interpreter carries out the kernels' own program with numpy, one tile after
another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.torch.triton.cases import Case, all_cases

pytest.importorskip("triton", reason="needs triton: pip install 'memcompile[triton]'")
# the results are one process's: one worker makes them, once
pytestmark = pytest.mark.xdist_group("triton interpreter")

CASES = all_cases()
# |got - want| / (1 + |want|); half types round inputs, weights and output
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 1.2e-2}
OPERATOR = [
    *(f"operator: {bits} bits {rest}" for bits in (0, 8, 4) for rest in ("float32", "bfloat16, sinks")),
    "operator: float64 goes to the definition",
    "operator: stateless dense",
    "operator: stateless bidirectional",
    "operator: stateless window",
    "operator: stateless padding",
    "operator: patterns",
    "operator: patterns over int8",
    "operator: patterns under a mask",
    "operator: patterns from 131 keys on",
]


@pytest.fixture(scope="module")
def errors(repository: Path) -> dict[str, dict[str, float]]:
    """The errors of every case, from a process in which the kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.backends.torch.triton.interpret"],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_the_definition(name: str, errors: dict[str, dict[str, float]]) -> None:
    case: Case = CASES[name]
    assert errors[name]["out"] <= TOLERANCE[case.dtype]
    # scores are float32 whatever the type, but int8 keys are rounded to it
    assert errors[name]["lse"] <= (TOLERANCE[case.dtype] if case.bits else 2e-6)


@pytest.mark.parametrize("name", OPERATOR)
def test_operator_agrees_with_the_definition(name: str, errors: dict[str, dict[str, float]]) -> None:
    assert errors[name]["out"] <= (TOLERANCE["bfloat16"] if "bfloat16" in name else 2e-6)
    assert errors[name]["state"] == 0.0


def test_parts_merge_by_their_log_sum_exp(errors: dict[str, dict[str, float]]) -> None:
    assert errors["law: merged parts"]["out"] <= 2e-6
    assert errors["law: merged parts"]["lse"] <= 2e-6
