"""Runs a lowered step graph with plain onnxruntime, the way docs/backends/onnxruntime.md describes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from memcompile.artifact.manifest import MASK_INPUT
from memcompile.kernels import find_library
from memcompile.lowering import Lowered


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, errors only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    library = find_library()
    assert library is not None, "this machine has no C++ compiler or no x86-64 CPU"
    options.register_custom_ops_library(str(library.path))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class StepDriver:
    """One sequence: shared buffers of fixed capacity, positions equal to slots."""

    def __init__(self, folder: Path, lowered: Lowered, capacity: int) -> None:
        self.session = open_session(folder / lowered.functions["step"].file)
        self.lowered = lowered
        self.used = 0
        self.buffers: dict[str, onnxruntime.OrtValue] = {}
        self.outputs: dict[str, str] = {}
        for state in lowered.states:
            shape = (1, state.kv_heads, capacity, state.stored_width)
            # a kernel must not read what it has not written
            poison = np.full(shape, np.nan if state.bits == 0 else 77, dtype=state.dtype)
            for name, out in ((state.key_in, state.key_out), (state.value_in, state.value_out)):
                self._hold(name, out, poison)
        for entry in lowered.functions["step"].inputs:
            if entry.name.startswith("observed."):
                shape = (1, *[int(d) for d in entry.dims[1:]])
                self._hold(entry.name, f"present_{entry.name}", np.zeros(shape, entry.dtype))

    def _hold(self, name: str, out: str, value: np.ndarray) -> None:
        self.buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(value))
        self.outputs[out] = name

    def step(self, tokens: list[int], rows: list[int]) -> np.ndarray:
        """Feed tokens; logits [N,V] of the wanted rows."""
        total = self.used + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "position_ids": np.arange(self.used, total, dtype=np.int64)[None],
            "logit_positions": np.array([rows], np.int64),
        }
        for group in self.lowered.groups:
            linear = group.input == MASK_INPUT
            feeds[group.input] = (
                np.ones((1, total), np.int64) if linear else np.arange(total, dtype=np.int64)[None]
            )
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, value in self.buffers.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        fresh = {}
        for out, name in self.outputs.items():
            # observed queries are small and move: they get a new value, caches are written in place
            if name.startswith("observed."):
                fresh[out] = name
                binding.bind_output(out)
            else:
                binding.bind_ortvalue_output(out, self.buffers[name])
        self.session.run_with_iobinding(binding)
        results = dict(zip(["logits", *self.outputs], binding.get_outputs(), strict=True))
        for out, name in fresh.items():
            self.buffers[name] = results[out]
        self.used = total
        logits: np.ndarray = results["logits"].numpy()[0]
        return logits
