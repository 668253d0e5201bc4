"""From an emitter to an ONNX file with external weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch

from memcompile.artifact.manifest import FunctionEntry, TensorEntry
from memcompile.backends.onnxruntime.emitter import OPSET
from memcompile.backends.onnxruntime.external import externalize, name_expressions
from memcompile.backends.onnxruntime.fuse import clean_up, name_dims
from memcompile.errors import MemcompileError
from memcompile.weights.parameter import hollowed

WEIGHTS: Final = "weights.bin"
# tensors smaller than this stay in the graph's own file
EXTERNAL_FROM_BYTES: Final = 4096
DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def to_model(
    module: torch.nn.Module,
    inputs: Sequence[TensorEntry],
    outputs: Sequence[TensorEntry],
    examples: Sequence[torch.Tensor],
) -> ir.Model:
    """Trace `module` over the examples and translate it; weights are neither read nor copied.

    A named dim of an input is dynamic.
    Raises MC901 when the exporter cannot translate an operator.
    """
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(entry.dims) if isinstance(dim, str)}
        for entry in inputs
    )
    try:
        with _quiet(), torch.no_grad(), hollowed(module):
            program = torch.export.export(module, tuple(examples), dynamic_shapes=(dynamic,), strict=False)
            # what lowerings looked through is dead now, and the exporter would trace it twice more
            program.graph_module.graph.eliminate_dead_code()
            program.graph_module.recompile()
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[entry.name for entry in inputs],
                output_names=[entry.name for entry in outputs],
                verbose=False,
                optimize=False,
            )
            assert exported is not None
            # the exporter's optimiser looks at values, and folds the small ones
            name_expressions(exported.model)
            exported.optimize()
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise MemcompileError(
            "MC901",
            f"the graph could not be translated to ONNX: {lines[0]}",
            where="backends/onnxruntime/export.py",
            fix="report the model; the torch backend runs it",
        ) from error
    model = exported.model
    clean_up(model)
    _set_interface(model.graph, inputs, outputs)
    return model


def _set_interface(
    graph: ir.Graph,
    inputs: Sequence[TensorEntry],
    outputs: Sequence[TensorEntry],
) -> None:
    assert len(graph.inputs) == len(inputs), (graph.inputs, inputs)
    assert len(graph.outputs) == len(outputs), (graph.outputs, outputs)
    for value, entry in zip(graph.inputs, inputs, strict=True):
        value.name = entry.name
    for value, entry in zip(graph.outputs, outputs, strict=True):
        value.name = entry.name
    name_dims(graph.inputs, [entry.dims for entry in inputs])
    name_dims(graph.outputs, [entry.dims for entry in outputs])


def write(
    model: ir.Model,
    path: Path,
    inputs: Sequence[TensorEntry],
    outputs: Sequence[TensorEntry],
    weights: str = WEIGHTS,
) -> FunctionEntry:
    """Write the graph to `path` and its large tensors, equal ones once, to `weights` beside it."""
    externalize(model, path.parent, weights, EXTERNAL_FROM_BYTES)
    ir.save(model, path)
    return FunctionEntry(path.name, tuple(inputs), tuple(outputs))


def write_beside(model: ir.Model, path: Path, written: Path) -> str:
    """Write another graph over the weights that `written` has already stored; gives the file's name."""
    stored = ir.load(written).graph.initializers
    for name, value in model.graph.initializers.items():
        if name in stored:
            value.const_value = stored[name].const_value
    ir.save(model, path)
    return path.name


def example(entry: TensorEntry, sizes: Mapping[str, int]) -> torch.Tensor:
    """A tensor to trace with; named dims take their size from `sizes`."""
    shape = [dim if isinstance(dim, int) else sizes[dim] for dim in entry.dims]
    return torch.zeros(shape, dtype=DTYPES[entry.dtype])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # the exporter logs optional packages it does not find, and torch warns of its own deprecations
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def dtype_name(dtype: Any) -> str:
    """A torch type's name as manifests write it."""
    return str(dtype).removeprefix("torch.")
