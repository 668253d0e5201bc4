"""Lower `compress`: one state's eviction is traced once a shape, and stamped out for every state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from memcompile.artifact.manifest import FunctionEntry, StateEntry, TensorEntry
from memcompile.backends.onnxruntime.export import example, to_model, write
from memcompile.backends.onnxruntime.interface import BATCH, StepInterface, cache_tensors
from memcompile.program import PositionGroup, Program, StateSpec
from memcompile.program.compress import EvictState

COMPRESS: Final = "compress.onnx"
COMPRESS_WEIGHTS: Final = "compress.bin"
_POSITIONS, _KEY, _VALUE, _OBSERVED = "positions", "key", "value", "observed"
_SCALES: Final = ("k_scale", "v_scale")
_RESULTS: Final = ("new_positions", "new_key", "new_value")


def lower_compress(program: Program, interface: StepInterface, destination: Path) -> FunctionEntry:
    """Write compress.onnx; inputs and outputs in the order of `memcompile.program.compress.Compress`."""
    compress = program.compress
    assert compress is not None
    inputs: list[TensorEntry] = []
    outputs: list[TensorEntry] = []
    model: onnx.ModelProto | None = None
    templates: dict[tuple[Any, ...], onnx.ModelProto] = {}
    entries = {state.region: state for state in interface.states}
    observed = {tensor.name: tensor for tensor in interface.inputs}
    graph = onnx.GraphProto(name="compress")
    for group, states in compress.groups:
        slots, kept = f"slots.{group.name}", f"kept.{group.name}"
        table = f"positions.{group.name}"
        inputs.append(TensorEntry(table, "int64", (BATCH, slots)))
        outputs.append(TensorEntry(f"present_{table}", "int64", (BATCH, kept)))
        for index, spec in enumerate(states):
            entry = entries[spec.region]
            for tensor in cache_tensors((entry,)):
                inputs.append(_with_slots(tensor, slots))
            for tensor in cache_tensors((entry,), out=True):
                outputs.append(_with_slots(tensor, kept))
            if entry.observed_in:
                inputs.append(observed[entry.observed_in])
            key = (group.name, spec.heads, spec.kv_heads, spec.head_dim, spec.bits, spec.observe_tokens)
            if key not in templates:
                templates[key] = _template(group, spec, entry)
            model = templates[key]
            names = {
                _POSITIONS: table,
                _KEY: entry.key_in,
                _VALUE: entry.value_in,
                _OBSERVED: entry.observed_in or "",
                "new_key": entry.key_out,
                "new_value": entry.value_out,
            }
            if index == 0:
                # every state of a group keeps as many tokens, so one table serves them all
                names["new_positions"] = f"present_{table}"
            _stamp(graph, model.graph, f"{spec.region}/", names)
            for name, scale in zip(_SCALES, compress.scales_of(spec), strict=False):
                value = numpy_helper.from_array(scale.float().numpy(), f"{spec.region}/{name}")
                graph.initializer.append(value)
    assert model is not None
    graph.input.extend(_value_info(tensor) for tensor in inputs)
    graph.output.extend(_value_info(tensor) for tensor in outputs)
    whole = onnx.ModelProto(ir_version=model.ir_version, graph=graph, opset_import=model.opset_import)
    return write(
        ir.serde.deserialize_model(whole), destination / COMPRESS, inputs, outputs, weights=COMPRESS_WEIGHTS
    )


def _template(group: PositionGroup, spec: StateSpec, entry: StateEntry) -> onnx.ModelProto:
    """The eviction of one state with neutral names, scales being inputs."""
    cache = (BATCH, spec.kv_heads, "slots", entry.stored_width)
    inputs = [
        TensorEntry(_POSITIONS, "int64", (BATCH, "slots")),
        TensorEntry(_KEY, entry.dtype, cache),
        TensorEntry(_VALUE, entry.dtype, cache),
    ]
    if spec.observe_tokens:
        inputs.append(TensorEntry(_OBSERVED, "float32", (BATCH, spec.heads, "queries", spec.head_dim)))
    if spec.bits:
        inputs += [TensorEntry(name, "float32", (spec.kv_heads * spec.head_dim,)) for name in _SCALES]
    kept = (BATCH, spec.kv_heads, "kept", entry.stored_width)
    outputs = [
        TensorEntry("new_positions", "int64", (BATCH, "kept")),
        TensorEntry("new_key", entry.dtype, kept),
        TensorEntry("new_value", entry.dtype, kept),
    ]
    sizes = {BATCH: 2, "slots": 24, "queries": 7}
    model = to_model(EvictState(group, spec), inputs, outputs, [example(tensor, sizes) for tensor in inputs])
    proto: onnx.ModelProto = ir.serde.serialize_model(model)
    assert not proto.functions, "the exporter inlines its functions"
    return proto


def _stamp(graph: onnx.GraphProto, template: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
    """Append the template's nodes and constants, with `names` for its inputs and outputs."""

    def renamed(name: str) -> str:
        return names.get(name) or (f"{prefix}{name}" if name else "")

    for node in template.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"{prefix}{node.name}"
        copy.input[:] = [renamed(name) for name in node.input]
        copy.output[:] = [renamed(name) for name in node.output]
    for constant in template.initializer:
        copy_constant = graph.initializer.add()
        copy_constant.CopyFrom(constant)
        copy_constant.name = f"{prefix}{constant.name}"


def _with_slots(tensor: TensorEntry, slots: str) -> TensorEntry:
    return TensorEntry(tensor.name, tensor.dtype, (*tensor.dims[:2], slots, tensor.dims[3]))


def _value_info(tensor: TensorEntry) -> onnx.ValueInfoProto:
    kind = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64", "int8": "INT8", "uint8": "UINT8"}
    element = onnx.TensorProto.DataType.Value(kind[tensor.dtype])
    return onnx.helper.make_tensor_value_info(tensor.name, element, list(tensor.dims))
