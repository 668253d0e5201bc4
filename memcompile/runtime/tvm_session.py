"""Run the artifact of the TVM backend: a compiled library, mapped weights, caches written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import Artifact
from memcompile.errors import MemcompileError
from memcompile.runtime.base import BaseSession, Logits, logits_width
from memcompile.runtime.buffers import Array, HostBuffer, aligned_zeros
from memcompile.runtime.cache import DECODING, State
from memcompile.runtime.tvm_library import TvmLibrary, runtime, to_numpy, use_threads
from memcompile.runtime.tvm_weights import Weights, open_weights

# here, so that loading the artifact without TVM's runtime names the package
runtime()

WEIGHTS_FILE: Final = "weights.safetensors"


class TvmSession(BaseSession):
    """An opened artifact of the TVM backend, on the CPU. Made by `memcompile.runtime.load`."""

    backend = "tvm"

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, provider: str | None = None
    ) -> None:
        device = provider or artifact.manifest.device
        if device != "cpu":
            raise MemcompileError(
                "MC511", f"provider {device!r} is not available: TVM artifacts run on the CPU only",
                where=str(artifact.path), fix="make the artifact again with target.device: cpu",
            )  # fmt: skip
        self._libraries: dict[str, TvmLibrary] = {}
        self._weights: Weights = open_weights(artifact.file(WEIGHTS_FILE))
        self._held: dict[str, list[Any]] = {}
        super().__init__(artifact, threads=threads, provider=provider)
        use_threads(self.threads)

    def _open(self, name: str) -> TvmLibrary:
        entry = self.manifest.functions[name]
        library = self._libraries.get(entry.file)
        if library is None:
            library = self._libraries[entry.file] = TvmLibrary(self.artifact.file(entry.file))
        weights = self._weights.of(name)
        wanted, got = library.arity(name), len(entry.inputs) + len(weights)
        if wanted != got:
            raise MemcompileError(
                "MC505", f"{name} takes {wanted} inputs, the manifest and the weights give {got}",
                where=str(self.artifact.path),
                fix="copy the whole directory again, or make the artifact again",
            )  # fmt: skip
        self._held[name] = [library.tensor(array) for array in weights]
        return library

    def call(self, name: str, inputs: list[Any]) -> list[Any]:
        """Run a function over tensors of its inputs in the manifest's order; gives its output tensors."""
        return self._functions[name].call(name, [*inputs, *self._held[name]])  # type: ignore[no-any-return]

    def _bind(self, state: State) -> TvmBinding:
        self._function("step")
        return TvmBinding(self, state)

    def _run(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        library: TvmLibrary = self._function(name)
        inputs = [
            library.tensor(aligned(feeds[tensor.name])) for tensor in self.manifest.functions[name].inputs
        ]
        # the outputs' memory goes back to TVM's pool with its tensors
        return [to_numpy(tensor).copy() for tensor in self.call(name, inputs)]


class TvmBinding:
    """Calls of `step` on the buffers of one state: the library writes new keys and values into them."""

    def __init__(self, session: TvmSession, state: State) -> None:
        self.state = state
        self._session = session
        self._library: TvmLibrary = session._function("step")
        self._inputs = [tensor.name for tensor in session.manifest.functions["step"].inputs]
        self._outputs = [tensor.name for tensor in session.manifest.functions["step"].outputs]
        self._vocab = logits_width(session.manifest)
        self._bound: tuple[int | None, int] | None = None
        self._caches: dict[str, Any] = {}

    def feed(self, row: int, tokens: NDArray[np.int64], logits_NV: Logits, all_logits: bool) -> None:
        """Run `tokens` as the next ones of a row, for which room has been made; logits go to `logits_NV`."""
        state, count = self.state, len(tokens)
        self._bind_caches(row)
        first = int(state.lengths[row])
        state.append(row, count)
        rows = np.arange(count, dtype=np.int64)[None] if all_logits else np.full((1, 1), -1, np.int64)
        tables = {
            table.group.input: table.positions[row : row + 1, : int(table.used[row])]
            for table in state.tables.values()
        }
        positions = np.arange(first, first + count, dtype=np.int64)[None]
        results = self._step(tokens.reshape(1, count), positions, rows, tables)
        logits_NV[:] = to_numpy(results["logits"])[0]
        for caches in state.caches:
            if caches.observed is not None and caches.entry.observed_out is not None:
                caches.observed.store(row, to_numpy(results[caches.entry.observed_out])[0])

    def decode(self, tokens: NDArray[np.int64]) -> Logits:
        """Run one token of every row, for which room has been made; returns the logits [B,V]."""
        state = self.state
        self._bind_caches(None)
        positions = state.lengths[:, None].copy()
        state.append_one_each()
        tables = {
            table.group.input: table.positions[:, : int(table.used.max())] for table in state.tables.values()
        }
        rows = np.full((state.batch, 1), -1, np.int64)
        results = self._step(tokens[:, None], positions, rows, tables)
        logits: Logits = to_numpy(results["logits"])[:, 0].copy()
        return logits

    def _step(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
        tables: Mapping[str, NDArray[np.int64]],
    ) -> dict[str, Any]:
        vocab = self._session.manifest.model.vocab_size
        if vocab and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            raise MemcompileError(
                "MC120", f"there are token ids outside 0..{vocab - 1}",
                fix="encode the text with the artifact's own tokenizer",
            )  # fmt: skip
        given = {"input_ids": tokens, "position_ids": positions, "logit_positions": rows, **tables}
        inputs = [
            self._caches[name] if name in self._caches else self._library.tensor(aligned(given[name]))
            for name in self._inputs
        ]
        return dict(zip(self._outputs, self._session.call("step", inputs), strict=True))

    def _bind_caches(self, row: int | None) -> None:
        state = self.state
        if self._bound == (row, state.generation):
            return
        self._caches.clear()
        for caches in state.caches:
            entry = caches.entry
            buffers = {entry.key_in: caches.key, entry.value_in: caches.value}
            if entry.observed_in is not None and caches.observed is not None:
                buffers[entry.observed_in] = caches.observed
            for name, buffer in buffers.items():
                assert isinstance(buffer, HostBuffer)
                array = buffer.array if row is None else buffer.array[row : row + 1]
                self._caches[name] = self._library.tensor(array)
            if entry.observed_in is not None and (caches.observed is None or state.phase == DECODING):
                # nobody reads the observed queries any more; TVM takes no empty tensor
                rows = state.batch if row is None else 1
                none = aligned_zeros((rows, entry.heads, 1, entry.head_dim), "float32")
                self._caches[entry.observed_in] = self._library.tensor(none)
        self._bound = (row, state.generation)


def aligned(array: Array) -> Array:
    """The array in memory that begins where vector loads want it: a copy."""
    new = aligned_zeros(array.shape, str(array.dtype))
    new[...] = array
    return new
