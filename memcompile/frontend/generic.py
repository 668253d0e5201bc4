"""Capture any `nn.Module` whose attention is read off its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.frontend.captured import (
    Captured,
    describe_outputs,
    evaluating,
    export_graph,
    flatten_program,
    tensor_spec,
)
from memcompile.frontend.recognise import recognise, recognise_norms, recognise_rotary
from memcompile.regions import Causal, ModelFacts, SlidingWindow, attention_regions

ExampleInputs = Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | torch.Tensor


def capture_module(module: torch.nn.Module, example_inputs: ExampleInputs) -> Captured:
    """Export `module` with dynamic batch (axis 0) and sequence (axis 1) and recognise its regions.

    Axis 1 is dynamic for inputs of two or three dimensions; where the module fixes it, it stays fixed.
    Raises MC205 when the inputs do not fit, MC204 when the module cannot be traced.
    """
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    as_keywords = isinstance(example_inputs, Mapping)
    named = (
        dict(example_inputs)
        if isinstance(example_inputs, Mapping)
        else {f"input_{i}": value for i, value in enumerate(example_inputs)}
    )
    if not named or not all(isinstance(v, torch.Tensor) for v in named.values()):
        raise MemcompileError(
            "MC205",
            "example_inputs must be one or more tensors",
            fix="pass a tensor, a tuple of tensors or a dict",
        )
    with evaluating(module):
        try:
            with torch.no_grad():
                module(**named) if as_keywords else module(*named.values())
        except Exception as error:
            raise MemcompileError(
                "MC205",
                f"{type(module).__name__} does not accept the example inputs: {error}",
                fix="check names, shapes and types of example_inputs",
            ) from error
        program = _export(module, named, as_keywords)
    graph, rebuild, flat = flatten_program(program, _argument_names(program, named))
    refusals = recognise(graph, tuple(named.values()))
    recognise_norms(graph)
    recognise_rotary(graph)
    inputs = tuple(tensor_spec(n.name, n.meta["val"]) for n in graph.graph.nodes if n.op == "placeholder")
    outputs = describe_outputs(flat)
    causal = _is_language_model(graph, inputs, outputs)
    facts = ModelFacts(
        family=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        causal=causal,
        layers=len({r.layer for r in attention_regions(graph)}),
        vocab_size=outputs[0].dims[-1] if causal and isinstance(outputs[0].dims[-1], int) else None,
        dtype=str(next((p.dtype for p in module.parameters()), torch.float32)).removeprefix("torch."),
    )
    return Captured(
        graph=graph, inputs=inputs, outputs=outputs, model=facts, rebuild=rebuild,
        logits_index=0 if causal else None, refusals=tuple(refusals), example_inputs=named,
    )  # fmt: skip


def _export(
    module: torch.nn.Module, named: dict[str, torch.Tensor], as_keywords: bool
) -> torch.export.ExportedProgram:
    grown = {
        name: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim and value.shape[0] == 1 else value
        for name, value in named.items()
    }
    grown = {name: value.contiguous() for name, value in grown.items()}

    def dynamic(axes: int) -> dict[str, dict[int, Any]]:
        names = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        return {
            name: {axis: names[axis] for axis in range(axes) if axis < value.ndim}
            for name, value in grown.items()
            if value.ndim
        } | {name: {} for name, value in grown.items() if not value.ndim}

    try:
        return export_graph(module, grown, dynamic(2), as_keywords=as_keywords)
    except MemcompileError:
        # some modules fix their sequence (a learned position per patch): the batch can still vary
        return export_graph(module, grown, dynamic(1), as_keywords=as_keywords)


def _argument_names(
    program: torch.export.ExportedProgram, named: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    user_inputs = program.graph_signature.user_inputs
    if len(user_inputs) == len(named) and all(isinstance(name, str) for name in user_inputs):
        return tuple(str(name) for name in user_inputs)
    return tuple(named)


def _is_language_model(graph: fx.GraphModule, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> bool:
    """Token ids in, one score per vocabulary entry out for every token, and every attention causal."""
    regions = attention_regions(graph)
    return (
        bool(regions)
        and all(isinstance(r.mask, (Causal, SlidingWindow)) for r in regions)
        and len(inputs) == 1
        and inputs[0].dtype in ("int64", "int32")
        and len(inputs[0].dims) == 2
        and bool(outputs)
        and len(outputs[0].dims) == 3
    )
