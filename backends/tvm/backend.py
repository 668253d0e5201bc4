"""Lower a program through TVM: one shared library, one file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from memcompile.artifact.manifest import FunctionEntry, PrefillEntry
from memcompile.backends.tvm.interface import step_interface
from memcompile.backends.tvm.trace import trace, weights_of
from memcompile.backends.tvm.weights import WEIGHTS, write_weights
from memcompile.errors import MemcompileError
from memcompile.lowering import Lowered, Progress, inline_higher_order
from memcompile.lowering.interface import StepInterface
from memcompile.program import Program

# bounds activations
CHUNK_TOKENS: Final = 512
DEVICES: Final = ("cpu", "cuda")


class TvmBackend:
    """TVM on the CPU it is lowered on."""

    name = "tvm"

    def lower(self, program: Program, destination: Path, *, device: str, progress: Progress) -> Lowered:
        """Write model.so and weights.safetensors.

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
            from memcompile.backends.tvm.build import LIBRARY, build, cpu_target
            from memcompile.backends.tvm.convert import to_relax
        except ImportError as error:
            raise MemcompileError(
                "MC115", f"the tvm backend needs a package that is not installed: {error}",
                where="target.backend", fix='pip install "memcompile[tvm]"',
            ) from error  # fmt: skip
        chunk = PrefillEntry(CHUNK_TOKENS)
        if program.step is None:
            raise NotImplementedError
        interface = step_interface(program)
        progress("lower step")
        graph = inline_higher_order(program.step)
        weights = weights_of(graph)
        exported = trace(graph, interface.inputs, _sizes(interface), weights)
        module = to_relax(exported, "step")
        progress("compile step")
        build(module, cpu_target(), destination / LIBRARY)
        progress("write weights")
        write_weights(destination / WEIGHTS, weights, {"step": list(weights)})
        functions = {"step": FunctionEntry(LIBRARY, interface.inputs, interface.outputs)}
        return Lowered(functions, interface.states, interface.groups, chunk, (LIBRARY, WEIGHTS))


def _sizes(interface: StepInterface) -> dict[str, int]:
    # distinct, none of them 0 or 1, so that the tracer takes no two dims for the same
    sizes = {"batch": 2, "tokens": 5, "rows": 3}
    for index, group in enumerate(interface.groups):
        sizes |= {f"slots.{group.name}": 11 + 2 * index, f"capacity.{group.name}": 40 + 2 * index}
        sizes[f"observed.{group.name}"] = 7
    return sizes
