"""Names, types and dims of a lowered step function: what a manifest says about caches and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memcompile.artifact.manifest import MASK_INPUT, EvictEntry, GroupEntry, StateEntry, TensorEntry
from memcompile.errors import MemcompileError
from memcompile.program import PositionGroup, Program, StateSpec

BATCH, TOKENS, ROWS = "batch", "tokens", "rows"
PAGE_TOKENS = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class StepInterface:
    """Inputs and outputs of `step`, and the manifest's view of states and groups."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    states: tuple[StateEntry, ...]
    groups: tuple[GroupEntry, ...]


@dataclass(frozen=True, slots=True)
class Conventions:
    """What backends do differently.

    head_dim: the width that a cache has for heads of a width; float_type: the type that a backend computes a
    type in; cache_type: the type in which it keeps keys and values of a type in a group; masked: the first
    plain group is told by `attention_mask` instead of positions.
    """

    head_dim: Callable[[int], int]
    float_type: Callable[[torch.dtype], str]
    cache_type: Callable[[torch.dtype, PositionGroup], str]
    masked: bool


def step_interface(program: Program, conventions: Conventions) -> StepInterface:
    """The interface of the program's step function.

    Raises MC203 for a group that is both windowed and evicted, which no cache layout serves.
    """
    groups = _groups(program, conventions)
    states = tuple(_state(s, program.group(s.group), conventions) for s in program.states)
    vocabulary = program.model.vocab_size or "vocabulary"
    inputs = [
        TensorEntry("input_ids", "int64", (BATCH, TOKENS)),
        TensorEntry("position_ids", "int64", (BATCH, TOKENS)),
        TensorEntry("logit_positions", "int64", (BATCH, ROWS)),
        *(TensorEntry(g.input, "int64", (BATCH, f"slots.{g.name}")) for g in groups),
    ]
    outputs = [TensorEntry("logits", "float32", (BATCH, ROWS, vocabulary))]
    inputs += cache_tensors(states)
    outputs += cache_tensors(states, out=True)
    for spec, state in zip(program.states, states, strict=True):
        if state.observed_in and state.observed_out:
            # the runtime feeds no past queries (width 0) once they have been used
            width = f"observed.{state.group}"
            dtype = conventions.float_type(spec.dtype)
            inputs.append(TensorEntry(state.observed_in, dtype, (BATCH, state.heads, width, spec.head_dim)))
            kept = (BATCH, state.heads, spec.observe_tokens, spec.head_dim)
            outputs.append(TensorEntry(state.observed_out, dtype, kept))
    for state in states:
        if state.bounds_in and state.bounds_out:
            pages = f"pages{state.page_tokens}.{state.group}"
            bounds = (BATCH, state.kv_heads, pages, 2 * state.stored_width)
            inputs.append(TensorEntry(state.bounds_in, state.dtype, bounds))
            outputs.append(TensorEntry(state.bounds_out, state.dtype, bounds))
    for state in states:
        if state.neurons_in and state.neurons_out:
            counts = (BATCH, state.neurons)
            inputs.append(TensorEntry(state.neurons_in, "float32", counts))
            outputs.append(TensorEntry(state.neurons_out, "float32", counts))
    return StepInterface(tuple(inputs), tuple(outputs), states, groups)


@dataclass(frozen=True, slots=True)
class ForwardInterface:
    """Inputs and outputs of `forward`, and an example size of each of its named dims."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    sizes: dict[str, int]


def forward_interface(program: Program, *, wide: bool) -> ForwardInterface:
    """The interface of the program's whole-sequence function; float inputs are float32 if `wide`."""
    placeholders = [n for n in program.forward.graph.nodes if n.op == "placeholder"]
    inputs: list[TensorEntry] = []
    sizes: dict[str, int] = {}
    for spec, node in zip(program.inputs, placeholders, strict=True):
        value = node.meta["val"]
        dtype = "float32" if value.is_floating_point() and wide else spec.dtype
        entry = TensorEntry(spec.name, dtype, tuple(_dim(dim) for dim in spec.dims))
        inputs.append(entry)
        sizes |= {str(dim): _hint(size) for dim, size in zip(entry.dims, value.shape, strict=True)}
    outputs = [
        TensorEntry(
            spec.name, "float32" if "float" in spec.dtype else spec.dtype, tuple(_dim(d) for d in spec.dims)
        )
        for spec in program.outputs
    ]
    return ForwardInterface(tuple(inputs), tuple(outputs), sizes)


def step_sizes(groups: Sequence[GroupEntry]) -> dict[str, int]:
    """Example sizes of a step's dims: distinct and none of them 0 or 1, so that no two are taken for one."""
    sizes = {BATCH: 2, TOKENS: 5, ROWS: 3}
    for index, group in enumerate(groups):
        sizes |= {f"slots.{group.name}": 11 + 2 * index, f"capacity.{group.name}": 40 + 2 * index}
        sizes[f"observed.{group.name}"] = 7
        sizes |= {f"pages{tokens}.{group.name}": 17 + 2 * index + tokens for tokens in PAGE_TOKENS}
    return sizes


def _dim(dim: int | str) -> int | str:
    if isinstance(dim, int) or dim.isidentifier():
        return dim
    return "_" + "".join(c if c.isalnum() else "_" for c in dim)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def cache_tensors(states: tuple[StateEntry, ...], *, out: bool = False) -> list[TensorEntry]:
    """Key and value tensors of the states, in order."""
    tensors = []
    for state in states:
        dims = (BATCH, state.kv_heads, f"capacity.{state.group}", state.stored_width)
        names = (state.key_out, state.value_out) if out else (state.key_in, state.value_in)
        tensors += [TensorEntry(name, state.dtype, dims) for name in names]
    return tensors


def _groups(program: Program, conventions: Conventions) -> tuple[GroupEntry, ...]:
    entries: list[GroupEntry] = []
    for group in program.groups:
        if group.window and group.evict is not None:
            raise MemcompileError(
                "MC203",
                f"the caches of {group.name} have a window of {group.window} tokens and are evicted as well",
                fix="give the layers to one of the two passes",
            )
        plain = conventions.masked and not group.window and group.evict is None
        masked = plain and all(e.input != MASK_INPUT for e in entries)
        evict = group.evict
        entries.append(
            GroupEntry(
                name=group.name,
                input=MASK_INPUT if masked else f"positions.{group.name}",
                kind="positions" if group.window else "linear",
                window=group.window,
                sinks=group.sinks if group.window else 0,
                block=group.block if group.window else 0,
                stride=group.stride if group.window else 0,
                evict=None
                if evict is None
                else EvictEntry(evict.keep_tokens, evict.keep_fraction, evict.observe_tokens),
            )
        )
    return tuple(entries)


def _state(spec: StateSpec, group: PositionGroup, conventions: Conventions) -> StateEntry:
    observes = bool(spec.observe_tokens)
    storage = {8: "int8", 4: "uint8"}.get(spec.bits) or conventions.cache_type(spec.dtype, group)
    return StateEntry(
        region=spec.region,
        group=group.name,
        kv_heads=spec.kv_heads,
        head_dim=conventions.head_dim(spec.head_dim),
        key_in=f"past_key_values.{spec.region}.key",
        value_in=f"past_key_values.{spec.region}.value",
        key_out=f"present.{spec.region}.key",
        value_out=f"present.{spec.region}.value",
        bits=spec.bits,
        dtype=storage,
        heads=spec.heads,
        observed_in=f"observed.{spec.region}" if observes else None,
        observed_out=f"present_observed.{spec.region}" if observes else None,
        page_tokens=spec.page_tokens,
        bounds_in=f"bounds.{spec.region}" if spec.page_tokens else None,
        bounds_out=f"present_bounds.{spec.region}" if spec.page_tokens else None,
        neurons=spec.neurons,
        neurons_in=f"neurons.{spec.region}" if spec.neurons else None,
        neurons_out=f"present_neurons.{spec.region}" if spec.neurons else None,
    )
