"""One line of a plan, resolved: which pass, with which setting, where it applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel

from memcompile.rewrite.selectors import HeadSelector, LayerSelector


class Workload(Protocol):
    """The sizes a plan is made for. Anything with these attributes will do."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def new_tokens(self) -> int: ...

    @property
    def batch(self) -> int: ...


@dataclass(frozen=True, slots=True)
class WorkloadSizes:
    """A workload as plain numbers."""

    prompt_tokens: int
    new_tokens: int = 0
    batch: int = 1


@dataclass(frozen=True, slots=True)
class PassEntry:
    """A pass to run.

    name: of the pass in the registry, "kv.evict".
    config: a validated instance of the pass's `Config`.
    layers, heads: where it applies; None: everywhere it can.
    expect: how many regions it must rewrite; fewer is an error.
    where: the place in the plan, "plan.yaml:14".
    """

    name: str
    config: BaseModel
    layers: LayerSelector | None = None
    heads: HeadSelector | None = None
    expect: int | None = None
    where: str = ""
