"""Trace a graph for TVM: kernels where there are some, definitions where not, weights as inputs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from memcompile.artifact.manifest import TensorEntry
from memcompile.backends.tvm import operators  # noqa: F401  (register)
from memcompile.backends.tvm.weights import DTYPES, Weight, code_key
from memcompile.dialect import DIALECT
from memcompile.dialect.quantized_linear import rounded_activations
from memcompile.dialect.quantized_weights import block_of
from memcompile.errors import MemcompileError
from memcompile.lowering import DefinitionInterpreter
from memcompile.regions import argument

aten: Any = torch.ops.aten
ours: Any = torch.ops.memcompile_tvm
# dialect operators that TVM has an operator of its own for
KEPT: Final = ("rms_norm",)
_ATTENTION_TENSORS: Final = ("q", "k", "v", "past_k", "past_v", "positions", "k_scale", "v_scale", "pattern")
_ATTENTION_FACTS: Final = (
    "scale", "causal", "window", "sinks", "block", "stride", "softcap", "bits", "pattern_block",
    "pattern_from",
)  # fmt: skip


class Tracer(DefinitionInterpreter):
    """Interprets a graph with operators that TVM has kernels for; computes in float32.

    `weights` are the traced values by their keys.
    """

    def __init__(self, graph_module: fx.GraphModule, weights: Mapping[Hashable, torch.Tensor]) -> None:
        super().__init__(graph_module)
        self._source = graph_module
        kept = {DIALECT[name].target for name in KEPT}
        self.definitions = {t: d for t, d in self.definitions.items() if t not in kept}
        self._weights = weights
        self._first_slots: dict[Any, torch.Tensor] = {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._weights.get(id(value), value)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.memcompile.attention.default and argument(n, "past_k") is not None:
            return self._attention(n)
        key = code_key(self._source, n)
        if key is not None:
            return self._quantized(n, self._weights[key])
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _widen(args), _widen(kwargs)
        if target is aten.linear.default and args[0].ndim >= 2 and args[1].ndim == 2:
            return _linear(*args, **kwargs)
        if target is aten.addmm.default and not kwargs:
            return _linear(args[1], args[2].t(), args[0])
        return super().call_function(target, args, kwargs)

    def _quantized(self, node: fx.Node, weight: torch.Tensor) -> torch.Tensor:
        """A layer whose codes became float32 when the weights were written."""
        if node.target is torch.ops.memcompile.quantized_embedding.default:
            return torch.nn.functional.embedding(self.env[argument(node, "indices")], weight)
        x, bias = self.env[argument(node, "x")], argument(node, "bias")
        if argument(node, "int8_activations"):
            x = rounded_activations(x, block_of(self.env[argument(node, "codes")], argument(node, "bits")))
        return _linear(x, weight, None if bias is None else self.env[bias])

    def _attention(self, node: fx.Node) -> Any:
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        value = {a.name: argument(node, a.name) for a in schema}
        for a in schema:
            known = a.name in (*_ATTENTION_TENSORS, *_ATTENTION_FACTS, "region")
            if not known and value[a.name] != a.default_value:
                raise MemcompileError(
                    "MC203", f"attention {value['region']} has a {a.name}, which the tvm backend cannot run",
                    where="target.backend", fix="use target.backend: onnxruntime",
                )  # fmt: skip
        tensors: dict[str, Any] = {
            name: self.env[given] for name, given in value.items() if isinstance(given, fx.Node)
        }
        table = value["positions"]
        if table not in self._first_slots:
            used = (tensors["positions"] >= 0).sum(dim=1)
            self._first_slots[table] = used - tensors["q"].shape[2]
        return ours.cached_attention(
            tensors["q"], tensors["k"], tensors["v"], tensors["past_k"], tensors["past_v"],
            tensors["positions"], self._query_positions(), self._first_slots[table],
            tensors.get("k_scale"), tensors.get("v_scale"), tensors.get("pattern"),
            *(value[name] for name in _ATTENTION_FACTS),
        )  # fmt: skip

    def _query_positions(self) -> torch.Tensor:
        value: torch.Tensor = next(v for n, v in self.env.items() if n.target == "position_ids")
        return value


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = ours.row_linear(x, weight)
    return out if bias is None else out + bias


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value.is_floating_point else value
    if isinstance(value, (tuple, list)):
        return type(value)(_widen(v) for v in value)
    return {k: _widen(v) for k, v in value.items()} if isinstance(value, dict) else value


class _Traced(torch.nn.Module):
    def __init__(self, graph_module: fx.GraphModule, weights: Sequence[Weight], inputs: int) -> None:
        super().__init__()
        self._held = [graph_module]  # in a list: its parameters are not this module's
        self._keys = [weight.key for weight in weights]
        self._inputs = inputs

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs, weights = given[: self._inputs], given[self._inputs :]
        tracer = Tracer(self._held[0], dict(zip(self._keys, weights, strict=True)))
        outputs = tracer.run(*inputs)
        tensors = tuple(value for value in outputs if isinstance(value, torch.Tensor))
        return tuple(value.float() if value.is_floating_point() else value for value in tensors)


def trace(
    graph_module: fx.GraphModule,
    inputs: Sequence[TensorEntry],
    sizes: Mapping[str, int],
    weights: Mapping[str, Weight],
) -> torch.export.ExportedProgram:
    """The exported program of a graph over `inputs` and then `weights`; no tensor is copied.

    `sizes` gives an example of every named dim. Raises MC901 when the graph cannot be traced.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        examples = [
            torch.empty([d if isinstance(d, int) else sizes[d] for d in e.dims], dtype=DTYPES[e.dtype])
            for e in inputs
        ]
        examples += [torch.empty(w.shape, dtype=DTYPES[w.dtype]) for w in weights.values()]
    dynamic: list[dict[int, Any]] = [
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(entry.dims) if isinstance(dim, str)}
        for entry in inputs
    ]
    dynamic += [{} for _ in weights]
    module = _Traced(graph_module, list(weights.values()), len(inputs))
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, tuple(examples), dynamic_shapes=(tuple(dynamic),), strict=False
            )
    except (torch._dynamo.exc.UserError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MemcompileError(
            "MC901",
            f"the graph could not be traced for TVM: {first}",
            where="backends/tvm/trace.py",
            fix="report the model; the onnxruntime and torch backends run it",
        ) from error
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
