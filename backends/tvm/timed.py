"""Attention and linear layers of TVM as the tuner times them: a compiled kernel, over tensors made once.

Attention is the kernel library against the kernel in TVMScript with its tiles; a linear layer is the kernel
in TVMScript with its tiles against what MetaSchedule finds for the very sizes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import tvm
from numpy.typing import NDArray

from memcompile.backends.tvm.kernels import (
    AttentionSizes,
    AttentionTiles,
    attention_kernel,
    library_attention_kernel,
    library_takes,
    linear_kernel,
)
from memcompile.backends.tvm.kernels.products import product_blocks
from memcompile.backends.tvm.place import Here, Place, export, measure
from memcompile.backends.tvm.rpc import Remote
from memcompile.backends.tvm.search import scheduled, tune_prim_func
from memcompile.errors import MemcompileError
from memcompile.kernels import find_library
from memcompile.kernels.build import build_object, cache_folder
from memcompile.tuning import (
    DECODE,
    KERNELS,
    PRODUCT_PREFILL,
    Candidate,
    Inputs,
    Opened,
    Parameter,
    Problem,
    Product,
    Shape,
    Sizes,
    Space,
)
from memcompile.tuning.attention import CHUNKS, KEY_TILE, PREFILL, SPLITS

BACKEND: Final = "tvm"
SCRIPT: Final = "tvmscript"
METASCHEDULE: Final = "metaschedule"
PACKAGES: Final = ("kernels", "apache-tvm")
CHUNK_TOKENS: Final = 512
TILES: Final = (
    Parameter("keys", (32, 64, 128), 64),
    Parameter("rows", (2, 4), 4),
    Parameter("tile_rows", (12, 24, 48), 24),
)
ROWS: Final = Parameter("rows", (2, 4, 6, 8), 4)
COLUMNS: Final = Parameter("columns", (2, 4, 8), 4)
# relative to the largest output: rounding, and codes of keys half way between two
TOLERANCES: Final = {0: 1e-4, 8: 2e-2, 4: 2e-2}
# a layer's cache is not in the processor's when its turn comes: so many bytes are read in between
COLD_BYTES: Final = 64 * 2**20
MOST_COPIES: Final = 16


def task_of(
    problem: Problem | Product,
    *,
    threads: int,
    dtype: str,
    rpc: str | None = None,
    trials: int = 16,
    search_seconds: float = 60.0,
) -> AttentionTask | ProductTask:
    """The task of a problem, on this machine or on the one whose RPC server is at `rpc`.

    MetaSchedule times at most `trials` candidates of a linear layer, none after `search_seconds`.
    Raises MC123 for a type other than float32, MC120 for a server that is not there.
    """
    if dtype != "float32":
        raise MemcompileError(
            "MC123",
            f"the tvm backend computes in float32, not in {dtype}",
            fix="leave out --dtype, or tune the torch backend",
        )
    place: Place = Here(threads) if rpc is None else _connected(rpc, threads)
    if isinstance(problem, Product):
        return ProductTask(problem, threads, place, trials=trials, search_seconds=search_seconds)
    return AttentionTask(problem, threads, place)


@functools.cache
def _connected(address: str, threads: int) -> Remote:
    # a server serves one connection at a time: tasks share it
    return Remote.connect(address, threads=threads)


def sizes_of(shape: Shape) -> AttentionSizes:
    """A region's sizes as the kernels take them."""
    return AttentionSizes(
        shape.heads, shape.kv_heads, shape.width, shape.width, shape.width**-0.5, True, shape.window,
        shape.sinks, shape.block, shape.stride, 0.0, shape.bits,
    )  # fmt: skip


class Call:
    """A kernel and the arguments of its calls, which take turns; the last one is the output."""

    def __init__(self, place: Place, module: Any, arguments: list[list[Any]], part: Any = ...) -> None:
        self._function, self._module, self._place = module["main"], module, place
        self._arguments, self._part, self._turn = arguments, part, 0

    def run(self) -> float | None:
        self._turn = (self._turn + 1) % len(self._arguments)
        given = self._arguments[self._turn]
        try:
            if self._place.machine is None:
                self._function(*given)
                return None
            return min(measure(self._module, given, device=self._place.device))
        except RuntimeError as error:
            raise ValueError(f"it does not run: {str(error).splitlines()[0]}") from error

    def output(self) -> NDArray[Any]:
        out: NDArray[Any] = self._arguments[self._turn][-1].numpy()[self._part]
        return out


@dataclass
class _Compiled:
    """What both tasks share."""

    problem: Any
    threads: int
    place: Place
    dtype: str = "float32"
    backend: str = BACKEND
    packages: tuple[str, ...] = PACKAGES

    @property
    def device(self) -> dict[str, str | int] | None:
        return self.place.machine

    def _load(self, kernel: Any, objects: Path | None = None) -> Any:
        # a library that is loaded, or sent, no longer needs its file
        with tempfile.TemporaryDirectory(prefix="memcompile-tune-") as folder:
            return self.place.load(export(kernel, self.place.target, Path(folder) / "kernel.so", objects))

    def _tensor(self, array: NDArray[Any]) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.place.device)


@dataclass
class AttentionTask(_Compiled):
    """The kernel library's attention, where it can be built, against the kernel in TVMScript."""

    _given: dict[tuple[int, bool], list[list[Any]]] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.problem.shape.bits]

    @property
    def space(self) -> Space:
        decode = self.problem.operator == DECODE
        chunk = () if decode else (Parameter("chunk", CHUNKS, CHUNK_TOKENS),)
        own: dict[str, tuple[Parameter, ...]] = {
            KERNELS: (SPLITS,) if decode else (KEY_TILE, *chunk),
            SCRIPT: (*TILES, *chunk),
        }
        if find_library() is None or not library_takes(sizes_of(self.problem.shape)):
            del own[KERNELS]
        return Space(self.problem.operator, own, _worth_trying)

    def open(self, candidate: Candidate) -> Opened:
        """Compile the candidate's kernel. Raises ValueError when it does not compile."""
        sizes, library = sizes_of(self.problem.shape), candidate.implementation == KERNELS
        if library:
            kernel = library_attention_kernel(
                sizes, key_tile=candidate.get("key_tile"), splits=candidate.get("splits")
            )
        else:
            kernel = attention_kernel(sizes, AttentionTiles(*(candidate.get(p.name) for p in TILES)))
        chunk = self.problem.chunk(candidate)
        if (chunk, library) not in self._given:
            self._given[chunk, library] = self._arguments(self.problem.inputs(chunk), library)
        module = self._load(kernel, build_object() if library else None)
        return Call(
            self.place, module, self._given[chunk, library], (slice(None), slice(None), self._middle(chunk))
        )

    def _middle(self, chunk: int) -> slice:
        # chunks of all sizes have the same middle; only that can be compared
        if self.problem.operator != PREFILL:
            return slice(0, 1)
        least = min(min(CHUNKS), self.problem.tokens)
        start = chunk // 2 - least // 2
        return slice(start, start + least)

    def _arguments(self, inputs: Inputs, library: bool) -> list[list[Any]]:
        shape, batch, chunk = self.problem.shape, inputs.q.shape[0], inputs.q.shape[1]
        heads = [x.transpose(0, 2, 1, 3) for x in (inputs.q, inputs.new(inputs.k), inputs.new(inputs.v))]
        positions = np.broadcast_to(inputs.positions, (batch, len(inputs.positions)))
        first = np.full(batch, inputs.past, np.int64)
        places = [self._tensor(x) for x in (positions, positions[:, inputs.past :], first)]
        scales = [] if inputs.scale is None else [self._tensor(inputs.scale)] * 2
        if library:
            scales = scales or [self._tensor(np.zeros(1, np.float32))] * 2
            scales.append(self._tensor(np.zeros((1, 4), np.int32)))
        out = self._tensor(np.zeros((batch, shape.heads, chunk, shape.width), np.float32))
        caches = [_packed(x, shape.bits) for x in (inputs.k, inputs.v)]
        copies = -(-COLD_BYTES // (2 * caches[0].nbytes)) if self.problem.operator == DECODE else 1
        given = [self._tensor(x) for x in heads]
        return [
            [*given, *(self._tensor(x) for x in caches), *places, *scales, out]
            for _ in range(min(max(copies, 1), MOST_COPIES))
        ]


@dataclass
class ProductTask(_Compiled):
    """A linear layer's kernel in TVMScript against MetaSchedule."""

    trials: int = 16
    search_seconds: float = 60.0
    tolerance: float = 1e-4
    _given: list[list[Any]] = field(default_factory=list)

    @property
    def space(self) -> Space:
        tiles = (ROWS, COLUMNS) if self.problem.operator == PRODUCT_PREFILL else (COLUMNS,)
        return Space(self.problem.operator, {SCRIPT: tiles, METASCHEDULE: ()})

    def open(self, candidate: Candidate) -> Opened:
        """Compile the candidate; MetaSchedule's is searched when no earlier search is known."""
        problem = self.problem
        if candidate.implementation == METASCHEDULE:
            kernel = self._searched(product_blocks(problem.rows, problem.width, problem.features))
        else:
            tiles = {name: candidate.get(name, 4) for name in ("rows", "columns")}
            kernel = linear_kernel(problem.width, problem.features, **tiles)
        if not self._given:
            x, weight = (self._tensor(array) for array in problem.inputs())
            self._given.append(
                [x, weight, self._tensor(np.zeros((problem.rows, problem.features), np.float32))]
            )
        return Call(self.place, self._load(kernel), self._given)

    def _searched(self, blocks: Any) -> Any:
        path = self._stored_at()
        if not path.exists():
            try:
                found = tune_prim_func(
                    blocks, self.place, trials=self.trials, seconds=self.search_seconds,
                    progress=lambda _: None,
                )  # fmt: skip
            except MemcompileError as error:
                raise ValueError(error.message) from error
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"trace": found.trace, "trials": found.trials}), encoding="utf-8")
        return scheduled(blocks, json.loads(path.read_text(encoding="utf-8"))["trace"])

    def _stored_at(self) -> Path:
        what = (self.problem.sizes, str(self.place.target), self.place.machine, self.threads, self.trials)
        digest = hashlib.sha256(repr((what, tvm.__version__)).encode()).hexdigest()[:16]
        return cache_folder() / "schedules" / f"{digest}.json"


def _worth_trying(candidate: Candidate, sizes: Sizes) -> bool:
    chunk = candidate.get("chunk", CHUNK_TOKENS)
    if candidate.implementation == SCRIPT and chunk != CHUNK_TOKENS:
        # its tiles do not reach from chunk to chunk
        return False
    # chunks longer than the prompt are all the same
    return chunk == CHUNK_TOKENS or chunk <= sizes["tokens"]


def _packed(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    """Keys or values as the cache holds them; int4 has two channels a byte, the first one low, plus 8."""
    if bits != 4:
        return codes
    shifted = (codes + 8).astype(np.uint8)
    packed: NDArray[Any] = shifted[..., 0::2] | shifted[..., 1::2] << 4
    return packed
