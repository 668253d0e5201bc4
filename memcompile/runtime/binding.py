"""Bind a state's buffers to the step graph once, and rebind only what changes from call to call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import GroupEntry, Manifest
from memcompile.artifact.manifest import MASK_INPUT
from memcompile.errors import MemcompileError
from memcompile.runtime.base import Logits, logits_width
from memcompile.runtime.buffers import Array, host_value
from memcompile.runtime.cache import DECODING, State


class StepBinding:
    """Calls of `step` on one state: `feed` a row's tokens, or `decode` one token of every row.

    Caches are bound as input and output of the same memory, so nothing of them is copied. A new binding of
    the caches is made only when another row is fed or the state replaced its buffers.
    """

    def __init__(self, session: Any, manifest: Manifest, state: State) -> None:
        self.state = state
        self._session = session
        step = manifest.functions["step"]
        self._inputs = {tensor.name: tensor.dtype for tensor in step.inputs}
        self._logits = step.outputs[0].name
        self._groups = manifest.groups
        self._vocab = logits_width(manifest)
        self._bound: tuple[int | None, int] | None = None
        self._binding: Any = None
        self._held: dict[str, Any] = {}
        batch = state.batch
        self._ones = np.ones((1, state.total_tokens), np.int64)
        self._tokens = np.zeros((batch, 1), np.int64)
        self._positions = np.zeros((batch, 1), np.int64)
        self._last = np.full((batch, 1), -1, np.int64)
        self._decoded: Logits = np.zeros((batch, 1, self._vocab), np.float32)

    def feed(self, row: int, tokens: NDArray[np.int64], logits_NV: Logits, all_logits: bool) -> None:
        """Run `tokens` as the next ones of a row, for which room has been made; logits go to `logits_NV`."""
        state = self.state
        if self._bound != (row, state.generation):
            self._bind_caches(row)
        count = len(tokens)
        first = int(state.lengths[row])
        state.append(row, count)
        self._input("input_ids", tokens.reshape(1, count))
        self._input("position_ids", np.arange(first, first + count, dtype=np.int64)[None])
        wanted = np.arange(count, dtype=np.int64)[None] if all_logits else np.full((1, 1), -1, np.int64)
        self._input("logit_positions", wanted)
        for group in self._groups:
            used = int(state.tables[group.name].used[row])
            if group.input == MASK_INPUT:
                self._input(MASK_INPUT, self._ones[:, :used])
            else:
                self._input(group.input, state.tables[group.name].positions[row : row + 1, :used])
        for caches in state.caches:
            if caches.observed is not None and caches.observed_next is not None:
                caches.observed.bind(self._binding, caches.entry.observed_in, None, row)
                caches.observed_next.bind(self._binding, None, caches.entry.observed_out, row)
        self._output(logits_NV[None])
        self._run()
        for caches in state.caches:
            if caches.observed is not None and caches.observed_next is not None:
                # the other rows' queries live in `observed` only, so this row's come back to it
                caches.observed.store(row, caches.observed_next.row(row))

    def decode(self, tokens: NDArray[np.int64]) -> Logits:
        """Run one token of every row, for which room has been made; returns the logits [B,V]."""
        state = self.state
        if self._bound != (None, state.generation):
            self._bind_caches(None)
            self._bind_decode()
        elif state.device != "cpu":
            # a bound host array is copied to the device when it is bound
            self._bind_decode()
        self._tokens[:, 0] = tokens
        self._positions[:, 0] = state.lengths
        state.append_one_each()
        for group in self._groups:
            self._input(group.input, self._group_input(group))
        self._run()
        return self._decoded[:, 0].copy()

    def _bind_decode(self) -> None:
        self._input("input_ids", self._tokens)
        self._input("position_ids", self._positions)
        self._input("logit_positions", self._last)
        self._output(self._decoded)

    def _group_input(self, group: GroupEntry) -> NDArray[np.int64]:
        table = self.state.tables[group.name]
        width = int(table.used.max())
        if group.input != MASK_INPUT:
            return np.ascontiguousarray(table.positions[:, :width])
        if self.state.batch == 1:
            return self._ones[:, :width]
        return (np.arange(width) < table.used[:, None]).astype(np.int64)

    def _bind_caches(self, row: int | None) -> None:
        state = self.state
        self._held.clear()
        self._binding = self._session.io_binding()
        for caches in state.caches:
            entry = caches.entry
            caches.key.bind(self._binding, entry.key_in, entry.key_out, row)
            caches.value.bind(self._binding, entry.value_in, entry.value_out, row)
            if caches.bounds is not None:
                caches.bounds.bind(self._binding, entry.bounds_in, entry.bounds_out, row)
            if caches.neurons is not None:
                counts = caches.neurons if row is None else caches.neurons[row : row + 1]
                value = self._held[str(entry.neurons_in)] = host_value(counts)
                self._binding.bind_ortvalue_input(entry.neurons_in, value)
                self._binding.bind_ortvalue_output(entry.neurons_out, value)
            if entry.observed_in is not None and state.phase == DECODING:
                # nobody reads the observed queries any more: none go in, and what comes out is not fetched
                rows = state.batch if row is None else 1
                none = np.zeros((rows, entry.heads, 0, entry.head_dim), self._inputs[entry.observed_in])
                self._input(entry.observed_in, none)
        self._bound = (row, state.generation)

    def _input(self, name: str, array: Array) -> None:
        if name in self._inputs:
            # the binding does not keep the array alive
            self._held[name] = value = host_value(array)
            self._binding.bind_ortvalue_input(name, value)

    def _output(self, array: Array) -> None:
        self._held[self._logits] = value = host_value(array)
        self._binding.bind_ortvalue_output(self._logits, value)

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise MemcompileError("MC901", f"ONNX Runtime could not run a step: {error}") from error
