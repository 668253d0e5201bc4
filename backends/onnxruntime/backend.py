"""Lower a program to ONNX Runtime: one file a function, one file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx_ir as ir
import torch
from torch import fx

from memcompile.artifact.manifest import MASK_INPUT, FunctionEntry, GroupEntry, PrefillEntry
from memcompile.backends.onnxruntime import (  # noqa: F401  (register)
    attention,
    dense,
    experts,
    ffn,
    layout,
    quantized,
    rotary,
)
from memcompile.backends.onnxruntime.compress import COMPRESS, COMPRESS_WEIGHTS, lower_compress
from memcompile.backends.onnxruntime.cuda_attention import for_cuda
from memcompile.backends.onnxruntime.emitter import Emitter
from memcompile.backends.onnxruntime.export import WEIGHTS, example, to_model, write, write_beside
from memcompile.backends.onnxruntime.finish import kernels_of, portable
from memcompile.backends.onnxruntime.genai import GENAI_CONFIG, GENAI_MODEL, is_plain, write_genai
from memcompile.backends.onnxruntime.interface import StepInterface, step_interface
from memcompile.backends.onnxruntime.timed import CHUNK_TOKENS
from memcompile.backends.onnxruntime.tuned import measure_switches, tuned_choices, with_choices
from memcompile.errors import MemcompileError
from memcompile.lowering import Lowered, Progress, inline_higher_order
from memcompile.lowering.interface import forward_interface, step_sizes
from memcompile.program import Program, without_choices
from memcompile.regions import argument, attention_nodes, ffn_regions
from memcompile.tuning import Choices, Database, Workload

MODEL: Final = "model.onnx"
# the same function over the same weights, with the kernel library's operators
KERNEL_MODEL: Final = "model.kernels.onnx"
# over a quantised cache the runtime's operator holds its whole score matrix, heads x chunk x keys in float32
QUANTIZED_CHUNK_TOKENS: Final = 256
# a head chooses its keys once a chunk: the longer the chunk, the less often
SPARSE_CHUNK_TOKENS: Final = 2048
DEVICES: Final = ("cpu", "cuda")


class OnnxRuntimeBackend:
    """ONNX Runtime on CPU or CUDA.

    With a workload, attention on the CPU runs on what `memcompile tune` found fastest for it.
    """

    name = "onnxruntime"

    def __init__(self, workload: Workload | None = None, database: Database | None = None) -> None:
        self._workload = workload
        self._database = database or Database.at(None)

    def tuned_for(self, workload: Workload) -> OnnxRuntimeBackend:
        """This backend, with the implementations that were measured as the best for a workload."""
        return OnnxRuntimeBackend(workload, self._database)

    def lower(self, program: Program, destination: Path, *, device: str, progress: Progress) -> Lowered:
        """Write model.onnx, weights.bin and, where they apply, compress.onnx and genai_config.json.

        Raises MC112 for an unknown device, MC116 for attention that the CUDA provider cannot run, MC122 for a
        tuning database that cannot be read, and MC901 for an operator that ONNX does not have.
        """
        if device not in DEVICES:
            raise MemcompileError(
                "MC112",
                f"unknown device {device!r} for onnxruntime",
                where="target.device",
                fix=f"use one of {', '.join(DEVICES)}",
            )
        decisions = _choice_decisions(program, device)
        if device != "cpu":
            program = without_choices(program)
        chunk = _chunk_tokens(program, device)
        if program.step is None:
            progress("lower forward")
            function = _lower_forward(program, destination, device)
            return Lowered({"forward": function}, (), (), PrefillEntry(chunk), _files(destination))
        interface = step_interface(program, device)
        progress("lower step")
        step, choices = self._lower_step(program, interface, destination, device, chunk)
        functions = {"step": step}
        if program.compress is not None:
            progress("lower compress")
            functions["compress"] = lower_compress(program, interface, destination)
        if is_plain(interface.states, interface.groups):
            progress("lower genai")
            write_genai(program.model, interface.states, destination, MODEL, device=device)
        prefill = PrefillEntry(choices.chunk, 1 if program.decodes_alone and device == "cpu" else 0)
        return Lowered(
            functions, interface.states, interface.groups, prefill, _files(destination),
            (*choices.decisions, *decisions),
        )  # fmt: skip

    def _lower_step(
        self, program: Program, interface: StepInterface, destination: Path, device: str, chunk: int
    ) -> tuple[FunctionEntry, Choices]:
        model = _step_model(program, interface, device)
        finished = for_cuda(model) if device == "cuda" else portable(model)
        entry = write(finished, destination / MODEL, interface.inputs, interface.outputs)
        if device != "cpu":
            return entry, Choices(chunk, {})
        choices = tuned_choices(
            model, interface.states, interface.groups, self._workload, self._database, chunk
        )
        switches = measure_switches(model, self._workload, self._database)
        choices = replace(choices, decisions=(*choices.decisions, *switches))
        fast = with_choices(model, choices)
        kernels = kernels_of(fast)
        if not kernels:
            return entry, choices
        # the weights are in the file that was just written
        kernel_file = write_beside(fast, destination / KERNEL_MODEL, destination / MODEL)
        return replace(entry, kernel_file=kernel_file, kernels=kernels), choices


def _chunk_tokens(program: Program, device: str) -> int:
    nodes = attention_nodes(program.forward) if program.step is not None else []
    if any(argument(node, "pattern") is not None for node in nodes):
        return SPARSE_CHUNK_TOKENS
    # our own kernels read codes without a score matrix
    codes = device != "cpu" and any(state.bits for state in program.states)
    return QUANTIZED_CHUNK_TOKENS if codes else CHUNK_TOKENS


def _choice_decisions(program: Program, device: str) -> tuple[dict[str, str], ...]:
    """What becomes of choices of pages and neurons where no kernel makes them."""
    pages = [state.region for state in program.states if state.page_tokens]
    layers = [region.region for region in ffn_regions(program.forward) if region.keep]
    who = f"without the kernel library, {MODEL}" if device == "cpu" else f"{MODEL} for {device}"
    return tuple(
        {"regions": ", ".join(regions), "decision": f"{who} {does} while decoding"}
        for regions, does in ((pages, "looks at every key"), (layers, "computes every neuron"))
        if regions
    )


def _files(destination: Path) -> tuple[str, ...]:
    names = (MODEL, WEIGHTS, KERNEL_MODEL, COMPRESS, COMPRESS_WEIGHTS, GENAI_CONFIG, GENAI_MODEL)
    return tuple(name for name in names if (destination / name).exists())


def is_wide(program: Program, device: str) -> bool:
    """Whether the lowered program computes in float32 whatever the model's type."""
    return not (device == "cuda" and program.model.dtype == "float16")


def _products_of(program: Program) -> str:
    """What our kernels may round to what they multiply: the model's own type, where they know it."""
    return "bfloat16" if program.model.dtype == "bfloat16" else "float32"


class _Step(torch.nn.Module):
    """The step graph behind the lowered interface; traced, not run."""

    def __init__(
        self, graph_module: fx.GraphModule, groups: Sequence[GroupEntry], *, wide: bool, products: str
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._groups = tuple(groups)
        self._wide = wide
        self._products = products

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        emitter = Emitter(self.graph_module, wide=self._wide, products=self._products)
        values = list(inputs)
        for offset, group in enumerate(self._groups, start=3):
            if group.input == MASK_INPUT:
                mask = inputs[offset]
                emitter.tables[f"positions_{group.name}"] = mask
                values[offset] = torch.where(mask > 0, mask.cumsum(1) - 1, -1)
        emitter.tables["position_ids"] = inputs[1]
        logits, *states = emitter.run(*values)
        return (logits.float(), *states)


def _step_model(program: Program, interface: StepInterface, device: str) -> ir.Model:
    assert program.step is not None
    graph = inline_higher_order(program.step)
    sizes = step_sizes(interface.groups)
    return to_model(
        _Step(graph, interface.groups, wide=is_wide(program, device), products=_products_of(program)),
        interface.inputs,
        interface.outputs,
        [example(entry, sizes) for entry in interface.inputs],
    )


class _Forward(torch.nn.Module):
    """A whole-sequence graph; outputs that are not tensors are dropped."""

    def __init__(self, graph_module: fx.GraphModule, *, wide: bool) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._wide = wide

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = Emitter(self.graph_module, wide=self._wide).run(*inputs)
        tensors = tuple(value for value in outputs if isinstance(value, torch.Tensor))
        return tuple(value.float() if value.is_floating_point() else value for value in tensors)


def _lower_forward(program: Program, destination: Path, device: str) -> FunctionEntry:
    wide = is_wide(program, device)
    interface = forward_interface(program, wide=wide)
    inputs, outputs = interface.inputs, interface.outputs
    module = _Forward(inline_higher_order(program.forward), wide=wide)
    examples = [example(entry, interface.sizes) for entry in inputs]
    model = portable(to_model(module, inputs, outputs, examples))
    return write(model, destination / MODEL, inputs, outputs)
