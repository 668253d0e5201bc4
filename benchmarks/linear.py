"""Linear layers over quantised weights: our CPU kernels beside ONNX Runtime's, in one run and in turns.

Both sides are sessions over the same codes, with as many products as overflow the last-level cache: a decoded
token never finds the weights of a layer there. Times are those of one product.

    python -m benchmarks.linear [--json] [--rows 1,512] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.attention import take_turns

Run = Callable[[], Any]
# outputs, inputs: the layers of SmolLM2-135M and its head, and a square one
SHAPES: Final = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096))
FORMATS: Final = ((4, "float"), (4, "int8"), (8, "float"), (8, "int8"))
BLOCK: Final = 32
COPIES_BYTES: Final = 96 * 2**20
# products of a session when inputs have many rows
MANY_ROWS_COPIES: Final = 4
# MatMulNBits' accuracy_level and our operator's attribute, by what activations are rounded to
LEVELS: Final = {"float": (0, 0), "int8": (4, 3)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many times faster `ours` is than MatMulNBits."""

    bits: int
    activations: str
    rows: int
    outputs: int
    inputs: int
    ours_ms: float
    theirs_ms: float
    speedup: float
    lowest: float
    highest: float
    gigabytes_per_second: float
    gflops: float


def session(operator: str, weight: Any, x: Any, level: int, copies: int, threads: int) -> Run:
    """`copies` products of x with stored codes, each with codes of its own; buffers are bound."""
    import numpy as np
    import onnx
    import onnxruntime

    from memcompile.kernels import find_library

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    rows, width, outputs = x.shape[0], x.shape[1], weight.codes.shape[0]
    ours = operator == "QuantizedLinear"
    attributes = {"K": width, "N": outputs, "bits": weight.bits, "block_size": BLOCK}
    attributes["activations" if ours else "accuracy_level"] = level
    domain = "memcompile" if ours else "com.microsoft"
    nodes, stored, shown = [], [], []
    for i in range(copies):
        names = {name: f"{name}{i}" for name in ("codes", "scales", "y")}
        inputs = ["x", names["codes"], names["scales"]]
        nodes.append(helper.make_node(operator, inputs, [names["y"]], domain=domain, **attributes))
        shown.append(helper.make_tensor_value_info(names["y"], kind, [rows, outputs]))
        for name in ("codes", "scales"):
            # the runtime computes products of equal weights once
            values = np.roll(getattr(weight, name).numpy(), i, axis=0)
            stored.append(onnx.numpy_helper.from_array(values, names[name]))
    given = [helper.make_tensor_value_info("x", kind, [rows, width])]
    graph = helper.make_graph(nodes, "g", given, shown, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    library = find_library()
    assert library is not None, "there is no kernel library"
    options.register_custom_ops_library(str(library.path))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = made.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    for i in range(copies):
        binding.bind_output(f"y{i}")
    return lambda: made.run_with_iobinding(binding)


def compare(bits: int, activations: str, rows: int, shape: tuple[int, int], rounds: int, threads: int) -> Any:
    """Both operators over the same codes."""
    import numpy as np
    import torch

    from memcompile.weights.methods import quantize

    outputs, width = shape
    weight = quantize(torch.randn(outputs, width), bits=bits, block=BLOCK, zero_point="none", method="rtn")
    x = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    copies = max(1, min(96, COPIES_BYTES // weight.nbytes)) if rows == 1 else MANY_ROWS_COPIES
    runs = {
        name: session(name, weight, x, level, copies, threads)
        for name, level in zip(("MatMulNBits", "QuantizedLinear"), LEVELS[activations], strict=True)
    }
    seconds = {name: [s / copies for s in spent] for name, spent in take_turns(runs, rounds).items()}
    ours, theirs = seconds["QuantizedLinear"], seconds["MatMulNBits"]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        bits, activations, rows, outputs, width, min(ours) * 1e3, min(theirs) * 1e3,
        min(theirs) / min(ours), min(ratios), max(ratios), weight.nbytes / min(ours) / 1e9,
        2 * rows * outputs * width / min(ours) / 1e9,
    )  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the comparisons as a markdown table."""
    print("| weights | inputs as | rows | layer | ours | MatMulNBits | faster | spread | GB/s | GFLOP/s |")
    print("| --- " * 10 + "|")
    for c in result["comparisons"]:
        cells = (
            f"{c['bits']} bits", c["activations"], c["rows"], f"{c['inputs']} → {c['outputs']}",
            f"{c['ours_ms']:.3f} ms", f"{c['theirs_ms']:.3f} ms", f"{c['speedup']:.2f}x",
            f"{c['lowest']:.2f}–{c['highest']:.2f}", f"{c['gigabytes_per_second']:.0f}", f"{c['gflops']:.0f}",
        )  # fmt: skip
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rows", default="1,512", help="rows of inputs: 1 is decoding, 512 a chunk of a prompt"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    from memcompile.kernels import find_library

    library = find_library()
    assert library is not None, "there is no kernel library"
    found = []
    for rows, shape, (bits, activations) in itertools.product(
        [int(x) for x in options.rows.split(",")], SHAPES, FORMATS
    ):
        if rows > 1 and shape[0] > 2**14:
            continue  # the head computes one row of a prompt
        print(f"{rows} rows, {shape}, {bits} bits", file=sys.stderr)
        found.append(asdict(compare(bits, activations, rows, shape, options.rounds, options.threads)))
    result = {"schema": 1, "instruction_set": library.isa, "comparisons": found}
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
