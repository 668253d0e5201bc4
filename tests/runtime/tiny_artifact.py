"""A small causal language model as an artifact, built node by node, and the same model in numpy float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from memcompile.artifact import (
    ArtifactWriter,
    EvictEntry,
    FunctionEntry,
    GroupEntry,
    Manifest,
    ModelEntry,
    PrefillEntry,
    StateEntry,
    TensorEntry,
)

Array = NDArray[Any]
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int8": TensorProto.INT8}
_TYPES |= {"uint8": TensorProto.UINT8}
_STORED = {0: "float32", 8: "int8", 4: "uint8"}
HIDDEN_KEY = -1e9


@dataclass(frozen=True)
class Layer:
    """What one layer's cache does. `keep_tokens` > 0: evicted to so many tokens after prefill."""

    window: int = 0
    sinks: int = 0
    block: int = 0
    stride: int = 0
    bits: int = 0
    keep_tokens: int = 0

    @property
    def group(self) -> GroupEntry:
        if self.keep_tokens:
            evict = EvictEntry(keep_tokens=self.keep_tokens, observe_tokens=4)
            return GroupEntry(f"evict_{self.keep_tokens}", f"positions.evict_{self.keep_tokens}", evict=evict)
        if not self.window:
            return GroupEntry("full", "attention_mask")
        name = f"window_{self.window}_{self.sinks}_{self.stride}"
        kind = (f"positions.{name}", "positions", self.window, self.sinks, self.block, self.stride)
        return GroupEntry(name, *kind)


@dataclass(frozen=True)
class TinyModel:
    """Sizes and weights; `layers` says what each layer's cache does."""

    layers: tuple[Layer, ...] = (Layer(), Layer())
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 32
    feed_forward: int = 0
    vocab: int = 61
    max_positions: int = 256
    chunk_tokens: int = 16
    seed: int = 0
    weights: dict[str, Array] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        width, stored = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"embed": (self.vocab, self.hidden), "head": (self.hidden, self.vocab)}
        for index in range(len(self.layers)):
            for name, shape in (
                ("q", (self.hidden, width)),
                ("k", (self.hidden, stored)),
                ("v", (self.hidden, stored)),
                ("o", (width, self.hidden)),
            ):
                shapes[f"{index}.{name}"] = shape
            if self.feed_forward:
                shapes[f"{index}.up"] = (self.hidden, self.feed_forward)
                shapes[f"{index}.down"] = (self.feed_forward, self.hidden)
        for name, shape in shapes.items():
            scale = 1.0 if name == "embed" else 1.5 / np.sqrt(shape[0])
            weight = random.standard_normal(shape, np.float32)
            weight *= np.float32(scale)
            self.weights[name] = weight
        half = self.head_dim // 2
        angles = np.arange(self.max_positions)[:, None] / 100.0 ** (np.arange(half) / half)
        self.weights["cos"] = np.cos(angles).astype(np.float32)
        self.weights["sin"] = np.sin(angles).astype(np.float32)

    def scale(self, bits: int) -> Array:
        """Static cache scales; a power of two, so that codes are the same in float32 and float64."""
        return np.full(self.kv_heads * self.head_dim, 2.0**-4 if bits == 8 else 2.0**-1, np.float32)


def reference(model: TinyModel, tokens: list[int], *, kept: dict[int, Array] | None = None) -> Array:
    """Logits [T,V] of a whole sequence in float64.

    kept: for an evicted layer, the positions that a query at or after `kept[-1]` may see of those before it
    is the union of kept positions and the new ones; given as {layer: [prompt_tokens, kept positions [G,n]]}.
    """
    weight = {name: array.astype(np.float64) for name, array in model.weights.items()}
    count = len(tokens)
    x = weight["embed"][tokens]
    positions = np.arange(count)
    for index, layer in enumerate(model.layers):
        h = _norm(x)
        q = _rotate(_heads(h @ weight[f"{index}.q"], model.heads), weight, positions)
        k = _rotate(_heads(h @ weight[f"{index}.k"], model.kv_heads), weight, positions)
        v = _heads(h @ weight[f"{index}.v"], model.kv_heads)
        if layer.bits:
            k, v = _quantised(k, layer.bits), _quantised(v, layer.bits)
        repeat = model.heads // model.kv_heads
        seen = np.broadcast_to(_seen(layer, count), (model.kv_heads, count, count)).copy()
        if kept is not None and index in kept:
            prompt, held = int(kept[index][0]), kept[index][1]
            for head in range(model.kv_heads):
                gone = np.setdiff1d(np.arange(prompt), held[head])
                seen[head, prompt:, gone] = False
        seen = np.repeat(seen, repeat, 0)
        k, v = np.repeat(k, repeat, 0), np.repeat(v, repeat, 0)
        scores = np.where(seen, q @ k.transpose(0, 2, 1) / np.sqrt(model.head_dim), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + (p @ v).transpose(1, 0, 2).reshape(count, -1) @ weight[f"{index}.o"]
        if model.feed_forward:
            x = x + np.maximum(_norm(x) @ weight[f"{index}.up"], 0) @ weight[f"{index}.down"]
    logits: Array = _norm(x) @ weight["head"]
    return logits


def _seen(layer: Layer, count: int) -> Array:
    key, query = np.arange(count)[None], np.arange(count)[:, None]
    seen: Array = key <= query
    if layer.window:
        near = (query - key < layer.window) | (key < layer.sinks)
        if layer.stride:
            near |= (key // layer.block) % layer.stride == 0
        seen = seen & near
    return seen


def _norm(x: Array) -> Array:
    normal: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return normal


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def _rotate(x: Array, weight: dict[str, Array], positions: Array) -> Array:
    cos, sin = weight["cos"][positions], weight["sin"][positions]
    low, high = np.split(x, 2, -1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def _quantised(x: Array, bits: int) -> Array:
    scale, top = (2.0**-4, 127) if bits == 8 else (2.0**-1, 7)
    return np.clip(np.rint(x / scale), -top - 1, top) * scale


class _Graph:
    """Collects the nodes of a graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._count = 0

    def constant(self, array: Array, name: str | None = None) -> str:
        self._count += 1
        name = name or f"c{self._count}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def op(
        self, kind: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attrs: Any
    ) -> str:
        self._count += 1
        outputs = outputs or (f"n{self._count}",)
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), domain=domain, **attrs))
        return outputs[0]


def _norm_node(g: _Graph, x: str) -> str:
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1))
    return g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.constant(np.array(1e-5, np.float32)))))


def _tensors(entries: tuple[TensorEntry, ...]) -> list[Any]:
    return [helper.make_tensor_value_info(e.name, _TYPES[e.dtype], list(e.dims)) for e in entries]


def states_of(model: TinyModel) -> tuple[StateEntry, ...]:
    """The manifest's states."""
    return tuple(
        StateEntry(
            region=str(i),
            group=layer.group.name,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            key_in=f"past_key_values.{i}.key",
            value_in=f"past_key_values.{i}.value",
            key_out=f"present.{i}.key",
            value_out=f"present.{i}.value",
            bits=layer.bits,
            dtype=_STORED[layer.bits],
            heads=model.heads,
            observed_in=f"observed.{i}" if layer.keep_tokens else None,
            observed_out=f"present_observed.{i}" if layer.keep_tokens else None,
        )
        for i, layer in enumerate(model.layers)
    )


def groups_of(model: TinyModel) -> tuple[GroupEntry, ...]:
    """The manifest's groups, in the order they first appear."""
    return tuple(dict.fromkeys(layer.group for layer in model.layers))


def step_model(model: TinyModel) -> tuple[Any, FunctionEntry]:
    """The step graph and its entry."""
    g = _Graph()
    groups, states = groups_of(model), states_of(model)
    inputs = [TensorEntry(n, "int64", ("B", "T")) for n in ("input_ids", "position_ids")]
    inputs += [TensorEntry(group.input, "int64", ("B", f"S_{group.name}")) for group in groups]
    outputs = [TensorEntry("logits", "float32", ("B", "N", model.vocab))]
    lengths = {group.name: _lengths(g, group) for group in groups}
    biases = {group.name: _bias(g, group) for group in groups if group.window}
    for name in ("cos", "sin", "embed", "head"):
        g.constant(model.weights[name], name)
    x = g.op("Gather", "embed", "input_ids")
    for index, state in enumerate(states):
        dims = ("B", model.kv_heads, f"C_{state.group}", state.stored_width)
        inputs += [TensorEntry(n, state.dtype, dims) for n in (state.key_in, state.value_in)]
        outputs += [TensorEntry(n, state.dtype, dims) for n in (state.key_out, state.value_out)]
        x = _layer(g, model, index, x, state, lengths[state.group], biases.get(state.group, ""))
        if state.observed_in and state.observed_out:
            width = ("B", model.heads, "W", model.head_dim)
            inputs.append(TensorEntry(state.observed_in, "float32", width))
            outputs.append(TensorEntry(state.observed_out, "float32", (*width[:2], 4, width[3])))
    # negative rows count from the end
    at = g.op("Unsqueeze", "logit_positions", g.ints(2))
    wide = g.op("Concat", g.ints(1, 1), g.ints(model.hidden), axis=0)
    rows = g.op("GatherElements", x, g.op("Expand", at, wide), axis=1)
    g.op("MatMul", _norm_node(g, rows), "head", outputs=("logits",))
    default = numpy_helper.from_array(np.array([[-1]], np.int64), "logit_positions")
    rows_entry = TensorEntry("logit_positions", "int64", ("B", "N"))
    entry = FunctionEntry("model.onnx", (*inputs, rows_entry), tuple(outputs))
    graph = helper.make_graph(
        g.nodes, "step", _tensors(entry.inputs), _tensors(entry.outputs), [*g.constants, default]
    )
    return _model(graph), entry


def _model(graph: Any) -> Any:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _lengths(g: _Graph, group: GroupEntry) -> tuple[str, str]:
    valid = group.input
    if valid != "attention_mask":
        there = g.op("GreaterOrEqual", valid, g.constant(np.array(0, np.int64)))
        valid = g.op("Cast", there, to=TensorProto.INT64)
    count = g.op("ReduceSum", valid, g.ints(1), keepdims=0)
    last = g.op("Cast", g.op("Sub", count, g.constant(np.array(1, np.int64))), to=TensorProto.INT32)
    total = g.op("Squeeze", g.op("Shape", valid, start=1, end=2))
    return last, g.op("Cast", total, to=TensorProto.INT32)


def _bias(g: _Graph, group: GroupEntry) -> str:
    def number(value: int) -> str:
        return g.constant(np.array(value, np.int64))

    key = g.op("Unsqueeze", group.input, g.ints(1))
    query = g.op("Unsqueeze", "position_ids", g.ints(2))
    near = g.op("Less", g.op("Sub", query, key), number(group.window))
    near = g.op("Or", near, g.op("Less", key, number(group.sinks)))
    if group.stride:
        block = g.op("Mod", g.op("Div", key, number(group.block)), number(group.stride))
        near = g.op("Or", near, g.op("Equal", block, number(0)))
    seen = g.op("And", g.op("LessOrEqual", key, query), near)
    seen = g.op("And", seen, g.op("GreaterOrEqual", key, number(0)))
    shown, hidden = (g.constant(np.array(v, np.float32)) for v in (0.0, HIDDEN_KEY))
    return g.op("Unsqueeze", g.op("Where", seen, shown, hidden), g.ints(1))


def _layer(
    g: _Graph, model: TinyModel, index: int, x: str, state: StateEntry, lengths: tuple[str, str], bias: str
) -> str:
    layer = model.layers[index]
    h = _norm_node(g, x)
    q, k, v = (g.op("MatMul", h, g.constant(model.weights[f"{index}.{n}"], f"w{index}.{n}")) for n in "qkv")
    q, k = (
        g.op("RotaryEmbedding", t, "position_ids", "cos", "sin", domain="com.microsoft", num_heads=heads)
        for t, heads in ((q, model.heads), (k, model.kv_heads))
    )
    attrs: dict[str, Any] = {"num_heads": model.heads, "kv_num_heads": model.kv_heads, "do_rotary": 0}
    ports = [q, k, v, state.key_in, state.value_in, *lengths, "", "", "", bias]
    if layer.bits:
        scale = g.constant(model.scale(layer.bits))
        ports += ["", scale, scale]
        attrs |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        attrs["kv_cache_bit_width"] = layer.bits
    outputs = (f"a{index}", state.key_out, state.value_out)
    attended = g.op("GroupQueryAttention", *ports, outputs=outputs, domain="com.microsoft", **attrs)
    if state.observed_in and state.observed_out:
        split = g.op("Reshape", q, g.ints(0, 0, model.heads, model.head_dim))
        heads = g.op("Transpose", split, perm=[0, 2, 1, 3])
        zeros = g.op("Concat", g.op("Shape", heads, start=0, end=2), g.ints(4, model.head_dim), axis=0)
        empty = g.op("ConstantOfShape", zeros)
        both = g.op("Concat", empty, state.observed_in, heads, axis=2)
        far = np.iinfo(np.int64).max
        g.op("Slice", both, g.ints(-4), g.ints(far), g.ints(2), outputs=(state.observed_out,))
    x = g.op("Add", x, g.op("MatMul", attended, g.constant(model.weights[f"{index}.o"], f"w{index}.o")))
    if model.feed_forward:
        up, down = (g.constant(model.weights[f"{index}.{n}"], f"w{index}.{n}") for n in ("up", "down"))
        x = g.op("Add", x, g.op("MatMul", g.op("Relu", g.op("MatMul", _norm_node(g, x), up)), down))
    return x


def compress_model(model: TinyModel) -> tuple[Any, FunctionEntry] | None:
    """Keep, per key/value head, the tokens whose keys score highest against the observed queries' sum."""
    g = _Graph()
    inputs: list[TensorEntry] = []
    outputs: list[TensorEntry] = []
    for group in groups_of(model):
        if group.evict is None:
            continue
        inputs.append(TensorEntry(group.input, "int64", ("B", "S")))
        outputs.append(TensorEntry(f"present_{group.input}", "int64", ("B", "K")))
        valid = g.op("GreaterOrEqual", group.input, g.constant(np.array(0, np.int64)))
        used = g.op("ReduceSum", g.op("Cast", valid, to=TensorProto.INT64), g.ints(1), keepdims=1)
        count = g.op("Squeeze", g.op("Min", g.ints(int(group.evict.keep_tokens or 0)), used), g.ints(0))
        zero, one = (g.constant(np.array(v, np.int64)) for v in (0, 1))
        rank = g.op("Range", zero, g.op("Squeeze", count), one)
        g.op("Unsqueeze", rank, g.ints(0), outputs=(f"present_{group.input}",))
        for state in states_of(model):
            if state.group == group.name:
                _compress_state(g, model, state, valid, count, inputs, outputs)
    if not inputs:
        return None
    entry = FunctionEntry("compress.onnx", tuple(inputs), tuple(outputs))
    graph = helper.make_graph(
        g.nodes, "compress", _tensors(entry.inputs), _tensors(entry.outputs), g.constants
    )
    return _model(graph), entry


def _compress_state(
    g: _Graph,
    model: TinyModel,
    state: StateEntry,
    valid: str,
    count: str,
    inputs: list[TensorEntry],
    outputs: list[TensorEntry],
) -> None:
    dims = ("B", model.kv_heads, "S", state.stored_width)
    observed = str(state.observed_in)
    inputs += [TensorEntry(n, state.dtype, dims) for n in (state.key_in, state.value_in)]
    inputs.append(TensorEntry(observed, "float32", ("B", model.heads, "W", model.head_dim)))
    kept = (*dims[:2], "K", dims[3])
    outputs += [TensorEntry(n, state.dtype, kept) for n in (state.key_out, state.value_out)]
    grouped = g.op("Reshape", observed, g.ints(0, model.kv_heads, -1, model.head_dim))
    query = g.op("ReduceSum", grouped, g.ints(2), keepdims=1)
    # any score will do: packed codes are weighed as they are
    query = g.op("Slice", query, g.ints(0), g.ints(state.stored_width), g.ints(3))
    key = g.op("Cast", state.key_in, to=TensorProto.FLOAT)
    scores = g.op("ReduceSum", g.op("Mul", key, query), g.ints(3), keepdims=0)
    lowest = g.constant(np.array(-np.inf, np.float32))
    scores = g.op("Where", g.op("Unsqueeze", valid, g.ints(1)), scores, lowest)
    g.op("TopK", scores, count, outputs=(f"t{state.region}", f"i{state.region}"), axis=2)
    wide = g.op("Cast", f"i{state.region}", to=TensorProto.FLOAT)
    g.op("TopK", wide, count, outputs=(f"u{state.region}", f"j{state.region}"), axis=2, largest=0)
    order = g.op("Cast", f"u{state.region}", to=TensorProto.INT64)
    shape = g.op("Concat", g.op("Shape", order), g.ints(state.stored_width), axis=0)
    index = g.op("Expand", g.op("Unsqueeze", order, g.ints(3)), shape)
    for name_in, name_out in ((state.key_in, state.key_out), (state.value_in, state.value_out)):
        g.op("GatherElements", name_in, index, outputs=(name_out,), axis=2)


def manifest_of(model: TinyModel, functions: dict[str, FunctionEntry], **changes: Any) -> Manifest:
    """The manifest without its files."""
    facts = ModelEntry(
        "tiny", model.vocab, model.max_positions, None, (), True, len(model.layers), 0, "float32"
    )
    values: dict[str, Any] = {
        "backend": "onnxruntime",
        "model": facts,
        "functions": functions,
        "threads": 1,
        "states": states_of(model),
        "groups": groups_of(model),
        "prefill": PrefillEntry(model.chunk_tokens),
    }
    return Manifest(**(values | changes))


def write_tiny(path: Path, model: TinyModel, *, files: dict[str, str] | None = None, **changes: Any) -> Path:
    """Write the model as an artifact; `files` are further text files, `changes` replace manifest fields."""
    with ArtifactWriter(path) as writer:
        graph, step = step_model(model)
        functions = {"step": step}
        big = sum(array.nbytes for array in model.weights.values()) > 2**20
        external = {"save_as_external_data": big, "location": "weights.bin"} if big else {}
        onnx.save_model(graph, str(writer.path / "model.onnx"), **external)
        compress = compress_model(model)
        if compress is not None:
            onnx.save_model(compress[0], str(writer.path / "compress.onnx"))
            functions["compress"] = compress[1]
        for name, text in (files or {}).items():
            (writer.path / name).write_text(text, encoding="utf-8")
        writer.seal(manifest_of(model, functions, **changes))
        return writer.commit()
