"""The sweep: every window at a node before the next one, and later nodes see what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from memcompile.calibrate.sweep import sweep
from memcompile.errors import MemcompileError


def graph() -> tuple[fx.GraphModule, list[fx.Node]]:
    """x -> x + 1 -> * 2 -> - 3 -> exp, with the two middle nodes to visit."""
    made = fx.Graph()
    x = made.placeholder("x")
    one = made.call_function(torch.ops.aten.add.Scalar, (x, 1))
    two = made.call_function(torch.ops.aten.mul.Scalar, (one, 2))
    three = made.call_function(torch.ops.aten.sub.Scalar, (two, 3))
    made.output((made.call_function(torch.ops.aten.exp.default, (three,)),))
    return fx.GraphModule(torch.nn.Module(), made), [two, three]


def windows(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.full((2,), float(index))} for index in range(count)]


def test_each_node_sees_all_windows_and_what_was_decided_before() -> None:
    graph_module, wanted = graph()
    seen: list[tuple[str, list[float]]] = []

    def visit(node: fx.Node, operands: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
        seen.append((node.name, [float(values[0][0]) for values in operands]))
        return [torch.full((2,), 100.0 + index) for index in range(len(operands))]

    sweep(graph_module, windows(), wanted, visit)
    assert seen == [("mul_scalar", [1.0, 2.0, 3.0]), ("sub_scalar", [100.0, 101.0, 102.0])]


def test_nothing_after_the_last_wanted_node_is_run() -> None:
    graph_module, wanted = graph()
    exp = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.exp.default)

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the sweep ran what nobody asked for")

    exp.target = fail
    sweep(graph_module, windows(), wanted, lambda node, operands: [values[0] for values in operands])


def test_a_missing_input_is_an_error() -> None:
    graph_module, wanted = graph()
    with pytest.raises(MemcompileError, match="MC205 calibration gives y, but the graph also wants x"):
        sweep(graph_module, [{"y": torch.ones(2)}], wanted, lambda node, operands: [])
