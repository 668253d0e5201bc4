"""What is known of a model apart from its graph, and the names and shapes of tensors at its edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of an interface; `dims` holds sizes, or names of sizes that vary."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "dtype": self.dtype, "dims": list(self.dims)}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of the source model that a program and its artifact keep."""

    family: str
    parameters: int
    causal: bool
    layers: int = 0
    vocab_size: int | None = None
    max_positions: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"


class Region(Protocol):
    """A part of a graph that a pass acts on. `layer` is None for what stands outside of all layers."""

    @property
    def node(self) -> fx.Node: ...

    @property
    def region(self) -> str: ...

    @property
    def layer(self) -> int | None: ...

    @property
    def path(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rewrite or a recogniser that does not apply: where, and why."""

    where: str
    reason: str
    pass_name: str = ""
