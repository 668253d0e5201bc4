"""What capture gives: one graph over the model's own weights, and the facts around it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from memcompile.errors import MemcompileError
from memcompile.regions import ModelFacts, Refusal, TensorSpec
from memcompile.weights.parameter import hollowed, unhollow

if TYPE_CHECKING:
    from memcompile.frontend.gguf_weights import StoredWeight

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    `graph` holds un-decomposed ATen and dialect operators; parameters are `get_attr` nodes that share the
    model's storage, or stand for tensors on disk (`weights.parameter`); placeholders carry the names of
    `inputs`. `rebuild` gives the flat outputs back in the original's own output type; `logits_index` is the
    flat output that holds a causal model's logits. `weights` are those that are stored as the codes of a
    model file.
    """

    graph: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model: ModelFacts
    rebuild: Callable[[tuple[Any, ...]], Any]
    logits_index: int | None = None
    tokenizer: Any = None
    tokenizer_folder: Path | None = None
    refusals: tuple[Refusal, ...] = field(default=())
    weights: tuple[StoredWeight, ...] = field(default=())
    example_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


BATCH, TOKENS = "batch", "tokens"


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module and its parts into eval mode; put each back as it was, whatever happens."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def export_graph(
    module: torch.nn.Module,
    example_inputs: Inputs,
    dynamic: Mapping[str, Mapping[int, Any]],
    *,
    as_keywords: bool = True,
) -> torch.export.ExportedProgram:
    """Export `module` with the named example inputs and dynamic axes; nothing is decomposed.

    Weights that are on disk are not read.
    """
    try:
        with hollowed(module):
            return torch.export.export(
                module,
                args=() if as_keywords else tuple(example_inputs.values()),
                kwargs=dict(example_inputs) if as_keywords else None,
                dynamic_shapes=dict(dynamic) if as_keywords else tuple(dynamic.values()),
                strict=False,
            )
    except MemcompileError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MemcompileError(
            "MC204",
            f"torch.export could not trace {type(module).__name__}: {first}",
            where=_line_of_forward(error) or type(module).__module__,
            fix="make the forward pass traceable: no branches or loops on tensor values, "
            "and example inputs that the module accepts",
        ) from error


def _line_of_forward(error: Exception) -> str | None:
    """The file and line of the model's own code that torch stopped at, if it came that far."""
    torch_folder = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if torch_folder not in Path(frame.filename).parents
    ]
    if not any(frame.name == "forward" for frame in frames):
        return None
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def flatten_program(
    program: torch.export.ExportedProgram, names: tuple[str, ...]
) -> tuple[fx.GraphModule, Callable[[tuple[Any, ...]], Any], list[Any]]:
    """A graph with flat inputs (named `names`) and flat tuple outputs, sharing the program's parameters."""
    exported = program.module(check_guards=False)
    exported.graph.set_codegen(fx.graph.CodeGen())
    # a fresh module: the exported one checks its inputs in a hook that knows only the original signature
    graph_module = fx.GraphModule(exported, exported.graph)
    unhollow(graph_module)
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    assert len(placeholders) == len(names), (placeholders, names)
    for node, name in zip(placeholders, names, strict=True):
        if node.name != name:
            with graph_module.graph.inserting_before(node):
                fresh = graph_module.graph.placeholder(name)
            fresh.meta = dict(node.meta)
            node.replace_all_uses_with(fresh)
            graph_module.graph.erase_node(node)
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    flat = output.args[0]
    flat = flat if isinstance(flat, (tuple, list)) else (flat,)
    output.args = (tuple(flat),)
    spec = program.call_spec.out_spec
    assert spec is not None

    def rebuild(values: tuple[Any, ...]) -> Any:
        return torch.utils._pytree.tree_unflatten(list(values), spec)

    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target):
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module, rebuild, list(flat)


def describe_outputs(flat: list[Any]) -> tuple[TensorSpec, ...]:
    """Specs of the flat outputs that are tensors, in order."""
    specs = []
    for index, value in enumerate(flat):
        if isinstance(value, fx.Node):
            specs.append(tensor_spec(f"output_{index}", value.meta["val"]))
    return tuple(specs)


def tensor_spec(name: str, value: torch.Tensor) -> TensorSpec:
    """The spec of a (fake) tensor; symbolic sizes keep their symbol's name."""
    dims = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), dims)
