"""Lower a program through TVM: one shared library, one file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from memcompile.artifact.manifest import FunctionEntry, GroupEntry, PrefillEntry, StateEntry
from memcompile.backends.tvm.interface import step_interface
from memcompile.backends.tvm.trace import trace
from memcompile.backends.tvm.weights import WEIGHTS, Weight, weights_of, write_weights
from memcompile.errors import MemcompileError
from memcompile.lowering import Lowered, Progress, inline_higher_order
from memcompile.lowering.interface import forward_interface, step_sizes
from memcompile.program import Program

if TYPE_CHECKING:
    import tvm

# bounds activations
CHUNK_TOKENS: Final = 512
DEVICES: Final = ("cpu", "cuda")


class TvmBackend:
    """TVM on the CPU it is lowered on; for CUDA, libraries and kernel source that were never run."""

    name = "tvm"

    def lower(self, program: Program, destination: Path, *, device: str, progress: Progress) -> Lowered:
        """Write model.so and weights.safetensors; for "cuda" also kernels.cu.

        Raises MC112 for an unknown device, MC115 where TVM or a C++ compiler is missing, MC203 for a program
        that the kernels have no layout for, MC901 for an operator that TVM does not import.
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
        except ImportError as error:
            raise MemcompileError(
                "MC115", f"the tvm backend needs a package that is not installed: {error}",
                where="target.backend", fix='pip install "memcompile[tvm]"',
            ) from error  # fmt: skip
        need_linker()
        work = _Work(LIBRARY, device)
        states: tuple[StateEntry, ...] = ()
        groups: tuple[GroupEntry, ...] = ()
        if program.step is None:
            progress("lower forward")
            work.add_forward(program)
        else:
            progress("lower step")
            interface = step_interface(program)
            states, groups = interface.states, interface.groups
            work.add_step(program)
            if program.compress is not None:
                progress("lower compress")
                work.add_compress(program)
        progress("compile")
        files = build(work.module(), destination / LIBRARY, device=device)
        progress("write weights")
        write_weights(destination / WEIGHTS, work.weights, work.order)
        return Lowered(work.functions, states, groups, PrefillEntry(CHUNK_TOKENS), (*files, WEIGHTS))


class _Work:
    """What the functions of one library come to: modules, manifest entries, weights and who takes which."""

    def __init__(self, file: str, device: str) -> None:
        self.functions: dict[str, FunctionEntry] = {}
        self.weights: dict[str, Weight] = {}
        self.order: dict[str, list[str]] = {}
        self._file = file
        self._device = device
        self._modules: list[tvm.IRModule] = []

    def add_step(self, program: Program) -> None:
        from memcompile.backends.tvm.convert import to_relax

        assert program.step is not None
        interface = step_interface(program)
        graph = inline_higher_order(program.step)
        weights = weights_of(graph)
        exported = trace(graph, interface.inputs, step_sizes(interface.groups), weights)
        self._modules.append(to_relax(exported, "step", device=self._device))
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
