"""What every test shares: one thread, no network, models made once."""

from __future__ import annotations

import os

# Before torch is imported: two OpenMP threads on a busy machine can be ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from memcompile.frontend import Captured

# graphs are made of millions of small objects that live on: checking the young ones less often saves time
gc.set_threshold(50_000, 20, 50)

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.fixture(autouse=True)
def _one_torch_thread_and_seed() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        # what a test draws does not depend on the tests before it
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _translations_are_read_once() -> None:
    """torch.onnx parses the sources of its 500 translations for every graph: once a process is enough."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    read = registration and registration.ONNXRegistry.from_torchlib
    if read and not hasattr(read, "cache_info"):
        registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(read))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct as a GGUF file. Tests that use it are marked slow."""
    if not SMOLLM2.exists():
        pytest.skip("SmolLM2 has not been fetched: run `make models`")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Callable[..., Captured]:
    """A function from options of `capture` to the real model, captured once, with a graph of the caller's."""
    from memcompile.frontend import capture
    from memcompile.program import copy_graph

    captured = functools.cache(functools.partial(capture, str(smollm2_path)))

    def copied(**options: str) -> Captured:
        once = captured(**options)
        return dataclasses.replace(once, graph=copy_graph(once.graph))

    return copied


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2: Callable[..., Captured], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model compiled for onnxruntime as it is, once."""
    from memcompile.pipeline import optimize
    from memcompile.plan import load_plan

    out = tmp_path_factory.mktemp("smollm2") / "out"
    optimize(smollm2(), load_plan({"target": {"threads": 1}}), out, evaluate=False)
    return out


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family to a Hugging Face folder with its tiny model and a tokenizer, written once."""
    from tests.models import save_tiny

    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return written[family]

    return folder


@pytest.fixture(scope="session")
def book() -> str:
    """The text of Persuasion, which the repository ships."""
    import lzma

    with lzma.open(ROOT / "examples" / "texts" / "persuasion.txt.xz", "rt", encoding="utf-8") as file:
        return file.read()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the real model as slow, and skip what needs a GPU where there is none."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "family" in callspec.params:
            # one worker for a family: its capture is made once (tests.models.captured_tiny)
            item.add_marker(pytest.mark.xdist_group(f"family {callspec.params['family']}"))
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            # one worker: the others must not load and capture the same model again
            item.add_marker(pytest.mark.xdist_group("smollm2"))
    wanting = [item for item in items if item.get_closest_marker("needs_gpu")]
    if wanting and not _has_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
