"""Where kernels are compiled for and run: this process, or (rpc.py) another machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tvm

from memcompile.backends.tvm.build import cpu_target

ENTRY: Final = "main"
_REPEATS: Final = 3
_REPEAT_MILLISECONDS: Final = 10


class Place(ABC):
    """A CPU that candidates run on."""

    threads: int

    @property
    @abstractmethod
    def target(self) -> Any:
        """TVM's target of it."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """TVM's device of it, to make tensors on."""

    @property
    @abstractmethod
    def machine(self) -> dict[str, str | int] | None:
        """What tells the machine from others; None: it is this one."""

    @abstractmethod
    def load(self, path: Path) -> Any:
        """The module of a compiled library. Raises ValueError when it does not load."""


@dataclass
class Here(Place):
    """This process."""

    threads: int = 1

    def __post_init__(self) -> None:
        tvm.get_global_func("runtime.config_threadpool")(1, self.threads)

    @property
    def target(self) -> Any:
        return cpu_target(self.threads)

    @property
    def device(self) -> Any:
        return tvm.cpu()

    @property
    def machine(self) -> None:
        return None

    def load(self, path: Path) -> Any:
        try:
            return tvm.runtime.load_module(str(path))
        except RuntimeError as error:
            raise ValueError(f"it does not load: {str(error).splitlines()[0]}") from error


def export(func: Any, target: Any, path: Path, kernels: Path | None = None) -> Path:
    """Compile one kernel, as the function `main`, into a library; `kernels` is an object to link in."""
    built = tvm.compile(tvm.IRModule({ENTRY: func.with_attr("global_symbol", ENTRY)}), target=target)
    linked = {"addons": [str(kernels)], "options": ["-pthread", "-Wl,-Bsymbolic"]} if kernels else {}
    built.export_library(str(path), **linked)
    return path


def measure(built: Any, arguments: list[Any], entry: str = ENTRY, device: Any = None) -> list[float]:
    """Mean seconds of a call, several times: of a kernel compiled here, or loaded by RPC on `device`."""
    timer = (built.mod if hasattr(built, "mod") else built).time_evaluator(
        entry, device or tvm.cpu(), number=1, repeat=_REPEATS, min_repeat_ms=_REPEAT_MILLISECONDS
    )
    return [float(result) for result in timer(*arguments).results]


def arguments_of(information: Any, device: Any = None) -> list[Any]:
    """Tensors that a kernel can be timed with: random, so that no value is special."""
    random = np.random.default_rng(0)
    arrays = [random.uniform(1, 2, [int(d) for d in i.shape]).astype(str(i.dtype)) for i in information]
    return [tvm.runtime.tensor(array, device or tvm.cpu()) for array in arrays]
