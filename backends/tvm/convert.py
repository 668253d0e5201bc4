"""From an exported program to a Relax module: operators of ours become calls of TVMScript kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from memcompile.backends.tvm.corrected import CORRECTED
from memcompile.backends.tvm.kernels import (
    AttentionSizes,
    AttentionTiles,
    attention_kernel,
    cuda_attention_kernel,
    library_attention_kernel,
    linear_kernel,
)
from memcompile.backends.tvm.tuned import Kernels
from memcompile.errors import MemcompileError
from memcompile.tuning import Choice

Importer = Any  # tvm.relax.frontend.torch's importer class, which it does not export


def to_relax(
    program: torch.export.ExportedProgram, function: str, *, device: str, kernels: Kernels | None = None
) -> tvm.IRModule:
    """A module with one Relax function of a name; `kernels` chooses on the CPU.

    Raises MC203 for attention that only the library has a kernel for, MC901 for an operator that TVM does not
    import.
    """
    made: dict[str, Any] = {}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch and TVM warn of each other's deprecations
            warnings.simplefilter("ignore")
            module = from_exported_program(
                program, custom_convert_map=_conversions(made, function, device, kernels or Kernels())
            )
    except MemcompileError:
        raise
    except Exception as error:
        # the importer raises whatever its hundred converters run into
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MemcompileError(
            "MC901",
            f"TVM {tvm.__version__} does not import the graph: {first}",
            where="backends/tvm/convert.py",
            fix="report the model; the onnxruntime and torch backends run it",
        ) from error
    main = module["main"].with_attr("global_symbol", function)
    renamed = {var: body for var, body in module.functions_items() if var.name_hint != "main"}
    result = tvm.IRModule({function: main})
    for var, body in renamed.items():
        result[var] = body
    return result


def _conversions(
    made: dict[str, Any], function: str, device: str, kernels: Kernels
) -> dict[str, Callable[[fx.Node, Importer], Any]]:
    """Converters by operator name; `made` maps a kernel's key to its global variable."""

    def add(importer: Importer, key: str, make: Callable[[], Any]) -> Any:
        if key not in made:
            name = f"{function}_{key.split('(', 1)[0]}_{len(made)}"
            made[key] = importer.block_builder.add_func(make().with_attr("global_symbol", name), name)
        return made[key]

    def row_linear(node: fx.Node, importer: Importer) -> Any:
        x, weight = importer.retrieve_args(node)
        builder = importer.block_builder
        if device == "cuda":
            return builder.emit(relax.op.linear(x, weight))
        features, width = (int(d) for d in weight.ty.shape)
        lead = list(x.ty.shape)[:-1]
        rows: Any = tvm.tirx.IntImm("int64", 1)
        for size in lead:
            rows = rows * size
        tile = kernels.tuned.linear(width, features)
        kernel = add(importer, f"linear({width},{features})", lambda: linear_kernel(width, features, **tile))
        flat = x if len(lead) == 1 else builder.emit(relax.op.reshape(x, (rows, width)))
        result = relax.TensorType((rows, features), "float32")
        out = builder.emit(relax.op.call_tir(kernel, [flat, weight], result))
        return out if len(lead) == 1 else builder.emit(relax.op.reshape(out, (*lead, features)))

    def cached_attention(node: fx.Node, importer: Importer) -> Any:
        arguments = importer.retrieve_args(node)
        tensors, (k_scale, v_scale, pattern) = list(arguments[:8]), arguments[8:11]
        q, _, v, cache_k, cache_v = tensors[:5]
        sizes = AttentionSizes(
            int(q.ty.shape[1]),
            int(cache_k.ty.shape[1]),
            int(q.ty.shape[3]),
            int(v.ty.shape[3]),
            *arguments[11:],
        )
        choice = kernels.attention(sizes) if device == "cpu" else AttentionTiles()
        make: Callable[[], Any]
        if isinstance(choice, Choice):
            key = f"library_attention({sizes})"
            make = partial(library_attention_kernel, sizes, key_tile=choice.key_tile, splits=choice.splits)
            scales = [k_scale, v_scale] if sizes.bits else [_zeros((1,), "float32")] * 2
            tensors += [*scales, _zeros((1, 4), "int32") if pattern is None else pattern]
        else:
            _need_no_choice(sizes)
            key = f"attention({sizes})"
            make = partial(attention_kernel, sizes, choice)
            if device == "cuda":
                make = partial(cuda_attention_kernel, sizes)
            tensors += [k_scale, v_scale] if sizes.bits else []
        kernel = add(importer, key, make)
        result = relax.TensorType((*list(q.ty.shape)[:3], v.ty.shape[3]), "float32")
        call = relax.op.call_tir_inplace(kernel, tensors, [-1, 3, 4], [result, cache_k.ty, cache_v.ty])
        return importer.block_builder.emit(call)

    def rms_norm(node: fx.Node, importer: Importer) -> Any:
        x, weight, eps = importer.retrieve_args(node)
        return importer.block_builder.emit(relax.op.nn.rms_norm(x, weight, axes=[-1], epsilon=eps))

    return {
        "row_linear.default": row_linear,
        "cached_attention.default": cached_attention,
        "rms_norm.default": rms_norm,
        **CORRECTED,
    }


def _zeros(shape: tuple[int, ...], dtype: str) -> Any:
    return relax.const(np.zeros(shape, dtype))


def _need_no_choice(sizes: AttentionSizes) -> None:
    if sizes.pattern_block:
        raise MemcompileError(
            "MC203",
            f"attention of {sizes.heads} heads of {sizes.width} channels chooses its keys at run time, which "
            "only the kernel library does: it cannot be built here, or has no kernel for the device or size",
            where="passes: attention.sparse",
            fix="use device: cpu on x86-64 with g++ or clang++, or target.backend: onnxruntime",
        )
