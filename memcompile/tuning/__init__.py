"""Tuning: which implementation is fastest on this machine, measured once and remembered (docs/tune.md)."""

from __future__ import annotations

from memcompile.tuning.attention import (
    DECODE,
    KERNELS,
    PREFILL,
    Inputs,
    Problem,
    Shape,
    Workload,
    problems,
    space_of,
)
from memcompile.tuning.choice import Ask, Choice, Choices, choose
from memcompile.tuning.database import Database, default_database
from memcompile.tuning.products import PRODUCT_DECODE, PRODUCT_PREFILL, Product, products
from memcompile.tuning.records import Key, Record
from memcompile.tuning.search import Settings
from memcompile.tuning.space import Candidate, Parameter, Sizes, Space
from memcompile.tuning.tuner import TASKS, Opened, Outcome, Task, Tunable, make_task, tune

__all__ = [
    "DECODE",
    "KERNELS",
    "PREFILL",
    "PRODUCT_DECODE",
    "PRODUCT_PREFILL",
    "TASKS",
    "Ask",
    "Candidate",
    "Choice",
    "Choices",
    "Database",
    "Inputs",
    "Key",
    "Opened",
    "Outcome",
    "Parameter",
    "Problem",
    "Product",
    "Record",
    "Settings",
    "Shape",
    "Sizes",
    "Space",
    "Task",
    "Tunable",
    "Workload",
    "choose",
    "default_database",
    "make_task",
    "problems",
    "products",
    "space_of",
    "tune",
]
