"""Lower a program through TVM: one shared library, one file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from memcompile.artifact.manifest import FunctionEntry, GroupEntry, PrefillEntry, StateEntry
from memcompile.backends.tvm.interface import step_interface
from memcompile.backends.tvm.trace import trace
from memcompile.backends.tvm.weights import WEIGHTS, Weight, weights_of, write_weights
from memcompile.errors import MemcompileError
from memcompile.kernels import find_library
from memcompile.kernels.build import build_object
from memcompile.lowering import Lowered, Progress, inline_higher_order
from memcompile.lowering.interface import forward_interface, step_sizes
from memcompile.program import Program, without_choices
from memcompile.regions import argument
from memcompile.tuning import Database, Workload

if TYPE_CHECKING:
    import tvm

    from memcompile.backends.tvm.tuned import Kernels

# bounds activations
CHUNK_TOKENS: Final = 512
# a head that chooses keys does so once a chunk
SPARSE_CHUNK_TOKENS: Final = 2048
DEVICES: Final = ("cpu", "cuda")


class TvmBackend:
    """TVM on the CPU it is lowered on; for CUDA, libraries and kernel source that were never run."""

    name = "tvm"

    def __init__(self, workload: Workload | None = None, database: Database | None = None) -> None:
        self._workload = workload
        self._database = database or Database.at(None)

    def tuned_for(self, workload: Workload) -> TvmBackend:
        """This backend, with the kernels that were measured as the best for a workload."""
        return TvmBackend(workload, self._database)

    def lower(self, program: Program, destination: Path, *, device: str, progress: Progress) -> Lowered:
        """Write model.so and weights.safetensors; for "cuda" also kernels.cu.

        Raises MC112 for an unknown device, MC115 where TVM or a C++ compiler is missing, MC122 for a tuning
        database that cannot be read, MC203 for a program that the kernels have no layout for, MC901 for an
        operator that TVM does not import.
        """
        if device not in DEVICES:
            raise MemcompileError(
                "MC112",
                f"unknown device {device!r} for tvm",
                where="target.device",
                fix=f"use one of {', '.join(DEVICES)}",
            )
        try:
            from memcompile.backends.tvm.build import LIBRARY, build, need_linker
            from memcompile.backends.tvm.tuned import Tuned
        except ImportError as error:
            raise MemcompileError(
                "MC115", f"the tvm backend needs a package that is not installed: {error}",
                where="target.backend", fix='pip install "memcompile[tvm]"',
            ) from error  # fmt: skip
        need_linker()
        # where there is no kernel library, attention is a kernel in TVMScript
        objects = build_object() if device == "cpu" and find_library() is not None else None
        work, tuned = (
            _Work(LIBRARY, device),
            Tuned(self._workload if device == "cpu" else None, self._database),
        )
        chunk, decisions = _chunk_tokens(program), _page_decisions(program)
        program = without_choices(program)
        states: tuple[StateEntry, ...] = ()
        groups: tuple[GroupEntry, ...] = ()
        if program.step is None:
            progress("lower forward")
            work.add_forward(program)
        else:
            progress("lower step")
            interface = step_interface(program)
            states, groups = interface.states, interface.groups
            kernels, choices = tuned.kernels(states, groups, chunk, library=objects is not None)
            chunk, decisions = choices.chunk, (*decisions, *choices.decisions)
            work.add_step(program, kernels)
            if program.compress is not None:
                progress("lower compress")
                work.add_compress(program)
        progress("compile")
        files = build(work.module(), destination / LIBRARY, device=device, kernels=objects)
        progress("write weights")
        write_weights(destination / WEIGHTS, work.weights, work.order)
        return Lowered(
            work.functions, states, groups, PrefillEntry(chunk), (*files, WEIGHTS), decisions
        )  # fmt: skip


def _page_decisions(program: Program) -> tuple[dict[str, str], ...]:
    paged = ", ".join(state.region for state in program.states if state.page_tokens)
    if not paged:
        return ()
    return ({"regions": paged, "decision": "model.so looks at every key while decoding"},)


def _chunk_tokens(program: Program) -> int:
    nodes = program.forward.graph.find_nodes(
        op="call_function", target=torch.ops.memcompile.attention.default
    )
    chooses = any(argument(node, "pattern") is not None for node in nodes)
    return SPARSE_CHUNK_TOKENS if chooses else CHUNK_TOKENS


class _Work:
    """What the functions of one library come to: modules, manifest entries, weights and who takes which."""

    def __init__(self, file: str, device: str) -> None:
        self.functions: dict[str, FunctionEntry] = {}
        self.weights: dict[str, Weight] = {}
        self.order: dict[str, list[str]] = {}
        self._file = file
        self._device = device
        self._modules: list[tvm.IRModule] = []

    def add_step(self, program: Program, kernels: Kernels) -> None:
        from memcompile.backends.tvm.convert import to_relax

        assert program.step is not None
        interface = step_interface(program)
        graph = inline_higher_order(program.step)
        weights = weights_of(graph)
        exported = trace(graph, interface.inputs, step_sizes(interface.groups), weights)
        self._modules.append(to_relax(exported, "step", device=self._device, kernels=kernels))
        self._enter("step", FunctionEntry(self._file, interface.inputs, interface.outputs), weights)

    def add_forward(self, program: Program) -> None:
        from memcompile.backends.tvm.convert import to_relax

        interface = forward_interface(program, wide=True)
        graph = inline_higher_order(program.forward)
        weights = weights_of(graph)
        exported = trace(graph, interface.inputs, interface.sizes, weights)
        self._modules.append(to_relax(exported, "forward", device=self._device))
        self._enter("forward", FunctionEntry(self._file, interface.inputs, interface.outputs), weights)

    def add_compress(self, program: Program) -> None:
        from memcompile.backends.tvm.compress import COMPRESS, lower_compress

        lowered = lower_compress(program, step_interface(program), self._file, self._device)
        self._modules.append(lowered.module)
        self._enter(COMPRESS, lowered.entry, {n: Weight.of(w) for n, w in lowered.weights.items()})

    def module(self) -> tvm.IRModule:
        """Everything in one module."""
        whole = self._modules[0]
        for module in self._modules[1:]:
            for variable, function in module.functions_items():
                whole[variable] = function
        return whole

    def _enter(self, name: str, entry: FunctionEntry, weights: dict[str, Weight]) -> None:
        self.functions[name] = entry
        self.order[name] = list(weights)
        self.weights |= weights
