"""The kernel library, set to each of its instruction sets in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memcompile.dialect.cpu_attention import cpu_library
from memcompile.kernels import KernelLibrary
from memcompile.kernels.build import INSTRUCTION_SETS


@pytest.fixture(params=list(INSTRUCTION_SETS))
def library(request: pytest.FixtureRequest) -> Iterator[KernelLibrary]:
    """The library set to one of its instruction sets."""
    found = cpu_library()
    assert found is not None, "this machine has no C++ compiler or no x86-64 CPU"
    widest = found.isa
    try:
        found.use(request.param)
    except ValueError as error:
        pytest.skip(f"needs {request.param}: {error}")
    yield found
    found.use(widest)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
