"""Attention of ONNX Runtime as the tuner times it: one node, finished as a candidate says, buffers bound.

The node is the one that `attention.py` traces, and `finish.py` makes of it what an artifact would hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from memcompile.backends.onnxruntime import finish
from memcompile.backends.onnxruntime.attention import padded_width
from memcompile.backends.onnxruntime.emitter import OPSET
from memcompile.backends.onnxruntime.nodes import MEMCOMPILE, MICROSOFT
from memcompile.errors import MemcompileError
from memcompile.kernels import TYPES, find_library
from memcompile.runtime.buffers import host_value
from memcompile.runtime.session import session_options
from memcompile.tuning import KERNELS, Candidate, Inputs, Opened, Parameter, Problem, Space, space_of
from memcompile.tuning.attention import CHUNKS, PREFILL

BACKEND: Final = "onnxruntime"
RUNTIME: Final = "runtime"
PACKAGES: Final = ("kernels", "onnxruntime")
# bounds activations and score matrices; larger chunks were not faster (docs/backends/onnxruntime.md)
CHUNK_TOKENS: Final = 512
# a layer's cache is not in the processor's when its turn comes: so many bytes are read in between
COLD_BYTES: Final = 64 * 2**20
MOST_COPIES: Final = 16
# relative to the largest output: rounding, and codes of keys half way between two
TOLERANCES: Final = {"float32": 1e-4, "bfloat16": 2e-2}
CODES_TOLERANCE: Final = 2e-2
IR_VERSION: Final = 10


def attention_task(problem: Problem, *, threads: int, dtype: str) -> AttentionTask:
    """The task of a problem; in bfloat16 kernels round what they multiply. Raises MC123 for other types."""
    if dtype not in TOLERANCES:
        raise MemcompileError(
            "MC123",
            f"onnxruntime has no attention in {dtype} on the CPU",
            fix="give --dtype float32 or bfloat16, or tune the torch backend",
        )
    return AttentionTask(problem, threads, dtype)


@dataclass
class AttentionTask:
    """GroupQueryAttention against the kernel library's operator. Inputs are made once a chunk and shared."""

    problem: Problem
    threads: int
    dtype: str = "float32"
    backend: str = BACKEND
    packages: tuple[str, ...] = PACKAGES
    device: None = None
    _feeds: dict[int, Feeds] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        return space_of(self.problem.operator, RUNTIME, Parameter("chunk", CHUNKS, CHUNK_TOKENS))

    @property
    def tolerance(self) -> float:
        return CODES_TOLERANCE if self.problem.shape.bits else TOLERANCES[self.dtype]

    def open(self, candidate: Candidate) -> Opened:
        """A session of one node. Raises ValueError when the runtime does not load it."""
        chunk = self.problem.chunk(candidate)
        if chunk not in self._feeds:
            self._feeds[chunk] = make_feeds(self.problem, chunk, self.dtype)
        feeds = self._feeds[chunk]
        model = finished(self.problem, feeds, candidate, self.dtype)
        options = session_options("step", self.threads)
        if candidate.implementation == KERNELS:
            library = find_library()
            if library is None:
                raise ValueError("the kernel library cannot be built here")
            options.register_custom_ops_library(str(library.path))
        try:
            session = ort.InferenceSession(
                ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ValueError(f"ONNX Runtime does not load it: {error}") from error
        return Bound(session, feeds, self._middle(chunk))

    def _middle(self, chunk: int) -> slice:
        # chunks of all sizes have the same middle; only that can be compared
        if self.problem.operator != PREFILL:
            return slice(0, 1)
        least = min(min(CHUNKS), self.problem.tokens)
        start = chunk // 2 - least // 2
        return slice(start, start + least)


@dataclass
class Feeds:
    """Input values by name, and enough copies of the cache that none stays in the processor's own."""

    values: dict[str, Any]
    caches: list[tuple[Any, Any]]


class Bound:
    """A session and its bindings, one a copy of the cache; calls take the copies in turn."""

    def __init__(self, session: Any, feeds: Feeds, middle: slice) -> None:
        self._session = session
        self._middle = middle
        self._turn = 0
        wanted = {value.name for value in session.get_inputs()}
        self._bindings = []
        for keys, values in feeds.caches:
            binding = session.io_binding()
            for name, value in feeds.values.items():
                if name in wanted:
                    binding.bind_ortvalue_input(name, value)
            for name, buffer in (("k", keys), ("v", values)):
                binding.bind_ortvalue_input(f"past_{name}", buffer)
                binding.bind_ortvalue_output(f"present_{name}", buffer)
            binding.bind_output("out")
            self._bindings.append(binding)

    def run(self) -> None:
        self._turn = (self._turn + 1) % len(self._bindings)
        try:
            self._session.run_with_iobinding(self._bindings[self._turn])
        except Exception as error:
            raise ValueError(f"ONNX Runtime does not run it: {error}") from error

    def output(self) -> NDArray[Any]:
        out: NDArray[Any] = self._bindings[self._turn].get_outputs()[2].numpy()
        return out[:, self._middle]


def make_feeds(problem: Problem, chunk: int, dtype: str = "float32") -> Feeds:
    """The traced node's inputs, by name, as the artifact of a model of type `dtype` gives them."""
    shape, inputs = problem.shape, problem.inputs(chunk)
    stored = padded_width(shape.width)
    batch, slots = inputs.q.shape[0], len(inputs.positions)
    packed = {
        name: _widened(rows, stored).reshape(batch, chunk, -1)
        for name, rows in (("q", inputs.q), ("k", inputs.new(inputs.k)), ("v", inputs.new(inputs.v)))
    }
    values: dict[str, Any] = {
        **packed,
        "last_slot": np.full(batch, slots - 1, np.int32),
        "slots": np.array(slots, np.int32),
    }
    if shape.window:
        values["positions"] = np.broadcast_to(inputs.positions, (batch, slots)).copy()
        values["bias"] = _bias(problem, inputs, chunk)
    if inputs.scale is not None:
        scale = inputs.scale.reshape(shape.kv_heads, shape.width)
        values["scale"] = _widened(scale, stored, 1.0).reshape(-1)
    caches = [_cache(x, stored, shape.bits, dtype) for x in (inputs.k, inputs.v)]
    copies = 1 if problem.operator == PREFILL else -(-COLD_BYTES // (2 * caches[0].nbytes))
    return Feeds(
        {name: host_value(np.ascontiguousarray(array)) for name, array in values.items()},
        # a value shares memory with its array: every copy has its own
        [tuple(host_value(x.copy()) for x in caches) for _ in range(min(max(copies, 1), MOST_COPIES))],
    )


def finished(problem: Problem, feeds: Feeds, candidate: Candidate, products: str = "float32") -> ir.Model:
    """A model of one attention node, as a candidate runs it."""
    model = _traced(problem, feeds)
    if candidate.implementation == RUNTIME:
        return finish.portable(model)
    for node in finish.attention_nodes(model):
        for name in ("key_tile", "splits"):
            node.attributes.add(ir.AttrInt64(name, candidate.get(name)))
        node.attributes.add(ir.AttrInt64("products", TYPES[products]))
    return finish.with_kernels(model, lambda _: True)


def _traced(problem: Problem, feeds: Feeds) -> ir.Model:
    shape = problem.shape
    given = {name: _value(name, value) for name, value in feeds.values.items()}
    pasts = [_value(f"past_{n}", x) for n, x in zip("kv", feeds.caches[0], strict=True)]
    outputs = [
        _like("out", given["q"]),
        *(_like(f"present_{n}", p) for n, p in zip("kv", pasts, strict=True)),
    ]
    scale = given.get("scale")
    node = ir.Node(
        MEMCOMPILE,
        "Attention",
        [
            *(given[name] for name in "qkv"), *pasts, given["last_slot"], given["slots"],
            given.get("positions"), scale, scale, None, given.get("bias"),
        ],
        [
            ir.AttrFloat32("scale", shape.width**-0.5),
            *(
                ir.AttrInt64(name, value)
                for name, value in {
                    "num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "causal": 1,
                    **{name: getattr(shape, name) for name in ("bits", "window", "sinks", "block", "stride")},
                }.items()
            ),
        ],
        outputs=outputs,
    )  # fmt: skip
    imports = {"": OPSET, MEMCOMPILE: 1, MICROSOFT: 1}
    graph = ir.Graph(
        [*given.values(), *pasts], outputs, nodes=[node], opset_imports=imports, name="attention"
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def _value(name: str, value: Any) -> ir.Value:
    return ir.Value(
        name=name, type=ir.TensorType(ir.DataType(value.element_type())), shape=ir.Shape(value.shape())
    )


def _like(name: str, value: ir.Value) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)


def _widened(rows: NDArray[Any], stored: int, fill: float = 0.0) -> NDArray[Any]:
    more = [(0, 0)] * (rows.ndim - 1) + [(0, stored - rows.shape[-1])]
    return np.pad(rows, more, constant_values=fill) if stored != rows.shape[-1] else rows


def _cache(rows: NDArray[Any], stored: int, bits: int, dtype: str) -> NDArray[Any]:
    """Keys or values as the buffer holds them; int4 has two channels a byte, the first one low, plus 8."""
    rows = _widened(rows, stored)
    if dtype == "bfloat16" and not bits:
        rounded: NDArray[Any] = torch.from_numpy(rows).bfloat16().view(torch.uint16).numpy()
        return rounded
    if bits != 4:
        return rows
    codes = (rows + 8).astype(np.uint8)
    packed: NDArray[Any] = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed


def _bias(problem: Problem, inputs: Inputs, chunk: int) -> NDArray[np.float32]:
    shape, keys = problem.shape, inputs.positions[None]
    queries = inputs.positions[-chunk:, None]
    seen = (queries - keys < shape.window) | (keys < shape.sinks)
    if shape.stride:
        seen |= (keys // shape.block) % shape.stride == 0
    bias = np.where(seen & (keys <= queries), 0.0, np.finfo(np.float32).min / 2).astype(np.float32)
    return np.broadcast_to(bias, (inputs.q.shape[0], 1, *bias.shape)).copy()
