"""Lower `compress`: the eviction of a state is imported once a shape, and called for every state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import tvm
from tvm import relax

from memcompile.artifact.manifest import FunctionEntry, StateEntry, TensorEntry
from memcompile.backends.tvm.convert import to_relax
from memcompile.backends.tvm.weights import DTYPES
from memcompile.lowering.interface import BATCH, StepInterface, cache_tensors
from memcompile.program import PositionGroup, Program, StateSpec
from memcompile.program.compress import EvictState

COMPRESS: Final = "compress"
_SCALES: Final = ("k_scale", "v_scale")


@dataclass(frozen=True)
class LoweredCompress:
    """The functions to compile, the manifest's entry, and the scales that `compress` takes as weights."""

    module: tvm.IRModule
    entry: FunctionEntry
    weights: dict[str, torch.Tensor]


def lower_compress(program: Program, interface: StepInterface, file: str, device: str) -> LoweredCompress:
    """Inputs and outputs in the order of `memcompile.program.compress.Compress`, one row at a time or more.

    Raises MC901 for a scorer that TVM does not import.
    """
    compress = program.compress
    assert compress is not None
    entries = {state.region: state for state in interface.states}
    observed = {tensor.name: tensor for tensor in interface.inputs}
    builder = relax.BlockBuilder()
    templates: dict[tuple[Any, ...], Any] = {}
    inputs: list[TensorEntry] = []
    outputs: list[TensorEntry] = []
    weights: dict[str, torch.Tensor] = {}
    calls: list[tuple[Any, list[str], bool]] = []
    for group, states in compress.groups:
        slots, kept, table = f"slots.{group.name}", f"kept.{group.name}", f"positions.{group.name}"
        inputs.append(TensorEntry(table, "int64", (BATCH, slots)))
        outputs.append(TensorEntry(f"present_{table}", "int64", (BATCH, kept)))
        for index, spec in enumerate(states):
            entry = entries[spec.region]
            mine = [_with_slots(tensor, slots) for tensor in cache_tensors((entry,))]
            mine += [observed[entry.observed_in]] if entry.observed_in else []
            inputs += mine
            outputs += [_with_slots(tensor, kept) for tensor in cache_tensors((entry,), out=True)]
            names = (f"{spec.region}/{name}" for name in _SCALES)
            scales = dict(zip(names, compress.scales_of(spec), strict=False))
            weights |= scales
            key = (group.name, spec.heads, spec.kv_heads, spec.head_dim, spec.bits, spec.observe_tokens)
            if key not in templates:
                templates[key] = _template(builder, f"evict_{len(templates)}", group, spec, entry, device)
            # every state of a group keeps as many tokens, so the first one's table serves them all
            calls.append((templates[key], [table, *(t.name for t in mine), *scales], index == 0))
    entries_ = [*inputs, *(TensorEntry(n, "float32", tuple(w.shape)) for n, w in weights.items())]
    module = _compose(builder, entries_, calls)
    return LoweredCompress(module, FunctionEntry(file, tuple(inputs), tuple(outputs)), weights)


def _template(
    builder: Any, name: str, group: PositionGroup, spec: StateSpec, entry: StateEntry, device: str
) -> Any:
    """Add the eviction of one state to the builder, scales being inputs; gives its global variable."""
    cache = torch.zeros(2, spec.kv_heads, 24, entry.stored_width, dtype=DTYPES[entry.dtype])
    dynamic = torch.export.Dim.DYNAMIC
    examples = [torch.zeros(2, 24, dtype=torch.int64), cache, cache.clone()]
    dims: list[dict[int, Any]] = [
        {0: dynamic, 1: dynamic},
        {0: dynamic, 2: dynamic},
        {0: dynamic, 2: dynamic},
    ]
    if spec.observe_tokens:
        examples.append(torch.zeros(2, spec.heads, spec.observe_tokens, spec.head_dim))
        dims.append({0: dynamic})
    if spec.bits:
        examples += [torch.ones(spec.kv_heads * spec.head_dim) for _ in _SCALES]
        dims += [{}, {}]
    with torch.no_grad():
        exported = torch.export.export(
            EvictState(group, spec), tuple(examples), dynamic_shapes=(tuple(dims),), strict=False
        )
    return builder.add_func(to_relax(exported, name, device=device)[name], name)


def _compose(
    builder: Any, inputs: list[TensorEntry], calls: list[tuple[Any, list[str], bool]]
) -> tvm.IRModule:
    """Add the function that calls an eviction for every state and gives all their results."""
    dims: dict[str, Any] = {}

    def size(dim: int | str) -> Any:
        return dim if isinstance(dim, int) else dims.setdefault(dim, tvm.tirx.Var(dim, "int64"))

    variables = {
        t.name: relax.Var(t.name, relax.TensorType([size(d) for d in t.dims], t.dtype)) for t in inputs
    }
    with builder.function(COMPRESS, list(variables.values())):
        results: list[Any] = []
        for function, names, first in calls:
            made = builder.emit(relax.Call(function, [variables[name] for name in names]))
            results += [builder.emit(relax.TupleGetItem(made, i)) for i in range(0 if first else 1, 3)]
        builder.emit_func_output(relax.Tuple(results))
    return builder.get()


def _with_slots(tensor: TensorEntry, slots: str) -> TensorEntry:
    return TensorEntry(tensor.name, tensor.dtype, (*tensor.dims[:2], slots, tensor.dims[3]))
