"""Attention alone: our CPU kernels beside torch's and ONNX Runtime's, in one run and in turns.

Every row is one comparison. The two sides take turns in rounds; the table gives the best time of each, the
ratio of the best times, and the ratios of the single rounds from the lowest to the highest.

    python -m benchmarks.attention [--json] [--rounds 5] [--tokens 2048,8192] [--only prefill|sparse|decode]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

Run = Callable[[], Any]
# query heads, key/value heads, head width
SHAPES: Final = ((9, 3, 64), (32, 8, 128))
DENSITIES: Final = (0.5, 0.25, 0.12, 0.06)
BLOCK: Final = 64
WINDOW, SINKS = 1024, 64
CHOSEN_SLOTS: Final = 1024
SETTLE_SECONDS: Final = 0.01
# a run that takes less is called twice, and the second call counts
SHORT_SECONDS: Final = 0.1
PARTS: Final = ("prefill", "sparse", "decode")
# a prefill whose causal work is more than this is left out: one call would take half a minute and more
MOST_FLOPS: Final = 1.5e12


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many times faster `ours` is than `baseline`; `rate` is ours, in `unit`."""

    part: str
    what: str
    shape: str
    tokens: int
    ours_ms: float
    baseline: str
    baseline_ms: float
    speedup: float
    lowest: float
    highest: float
    rate: float
    unit: str
    wanted: float | None = None

    @property
    def passed(self) -> bool:
        return self.wanted is None or self.speedup >= self.wanted


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; a first round that warms up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            # let the threads of the one before stop spinning, and wake those of this one
            time.sleep(SETTLE_SECONDS)
            spent = SHORT_SECONDS if turn == 0 else min(seconds[name], default=0.0)
            if spent < SHORT_SECONDS:
                run()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: spent[1:] for name, spent in seconds.items()}


class Bench:
    """The tensors and the implementations of one shape."""

    def __init__(self, heads: int, kv_heads: int, width: int, threads: int, rounds: int) -> None:
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.threads, self.rounds = threads, rounds
        self.shape = f"{heads}/{kv_heads}x{width}"

    def tensors(self, queries: int, keys: int, dtype: Any) -> list[Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        sizes = ((self.heads, queries), (self.kv_heads, keys), (self.kv_heads, keys))
        return [torch.randn(1, h, t, self.width, generator=generator).to(dtype) for h, t in sizes]

    def ours(self, tensors: list[Any], **more: Any) -> Run:
        from memcompile.dialect.cpu_attention import kernel_attention

        def run() -> Any:
            out = kernel_attention(*tensors, scale=self.width**-0.5, threads=self.threads, **more)
            assert out is not None, "there is no kernel library"
            return out

        return run

    def torch_sdpa(self, tensors: list[Any], causal: bool) -> Run:
        import torch

        def run() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors, is_causal=causal, enable_gqa=True
            )

        return run

    def compare(
        self, part: str, what: str, tokens: int, runs: dict[str, Run], *, work: float, unit: str,
        wanted: dict[str, float], rounds: int | None = None,
    ) -> Iterator[Comparison]:  # fmt: skip
        """The run called "ours" against every other one; `work` in what `unit` counts a second."""
        seconds = take_turns(runs, rounds or self.rounds)
        ours = seconds.pop("ours")
        for name, theirs in seconds.items():
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            yield Comparison(
                part, what, self.shape, tokens, min(ours) * 1e3, name, min(theirs) * 1e3,
                min(theirs) / min(ours), min(ratios), max(ratios), work / min(ours), unit, wanted.get(name),
            )  # fmt: skip


def prefill(bench: Bench, tokens: int) -> Iterator[Comparison]:
    """Dense causal prefill in float32 and bfloat16."""
    import torch

    flops = 2 * bench.heads * bench.width * tokens * tokens
    if flops > MOST_FLOPS:
        return
    rounds = 2 if flops > 2e11 else bench.rounds
    single, half = (bench.tensors(tokens, tokens, t) for t in (torch.float32, torch.bfloat16))
    for what, tensors, wanted in (("float32", single, 1.0), ("bfloat16", half, 2.0)):
        runs = {"ours": bench.ours(tensors), "torch sdpa": bench.torch_sdpa(tensors, True)}
        wants = {"torch sdpa": wanted}
        if tokens <= 8192 and bench.heads == 9:
            runs["ONNX Runtime GQA float32"] = group_query_attention(bench, single, bits=0, used=0)
            wants["ONNX Runtime GQA float32"] = 1.4
        yield from bench.compare(
            "prefill", what, tokens, runs, work=flops / 1e9, unit="GFLOP/s", wanted=wants, rounds=rounds
        )


def sparse(bench: Bench, tokens: int) -> Iterator[Comparison]:
    """Blocks of keys chosen at random at several densities, and a window, against our own dense kernel."""
    import torch

    flops = 2 * bench.heads * bench.width * tokens * tokens
    if flops > MOST_FLOPS:
        return
    tensors = bench.tensors(tokens, tokens, torch.float32)
    dense = bench.ours(tensors)
    count = -(-tokens // BLOCK)
    causal = torch.ones(count, count).tril().bool()
    for density in DENSITIES:
        generator = torch.Generator().manual_seed(1)
        blocks = (torch.rand(1, bench.heads, count, count, generator=generator) < density) & causal
        blocks |= torch.eye(count).bool()
        real = float((blocks & causal).sum() / (bench.heads * causal.sum()))
        runs = {"ours": bench.ours(tensors, blocks=blocks, block_tokens=BLOCK), "our dense": dense}
        if density == 0.12 and tokens <= 8192 and bench.heads == 9:
            runs["torch, one sdpa a block"] = block_loop(tensors, blocks)
            if (flex := flex_attention(tensors, blocks)) is not None:
                runs["torch FlexAttention, compiled"] = flex
        yield from bench.compare(
            "sparse", f"blocks, {real:.1%}", tokens, runs, work=flops * real / 1e9, unit="GFLOP/s",
            wanted={"our dense": 0.85 / real}, rounds=min(bench.rounds, 3),
        )  # fmt: skip
    seen = WINDOW + SINKS
    work = 4 * bench.heads * bench.width * (seen * tokens - seen * seen / 2) / 1e9
    runs = {"ours": bench.ours(tensors, window=WINDOW, sinks=SINKS), "our dense": dense}
    yield from bench.compare(
        "sparse", f"window {WINDOW}+{SINKS}", tokens, runs, work=work, unit="GFLOP/s",
        wanted={"our dense": 6.0} if tokens >= 16384 else {}, rounds=min(bench.rounds, 3),
    )  # fmt: skip


def decode(bench: Bench, tokens: int) -> Iterator[Comparison]:
    """One query over a long cache: read at the speed of memory, in codes, or over chosen slots."""
    import torch

    elements = 2 * bench.kv_heads * tokens * bench.width
    scale = torch.full((bench.kv_heads * bench.width,), 0.02)
    single = bench.tensors(1, tokens, torch.float32)
    for what, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        tensors = bench.tensors(1, tokens, dtype)
        size = elements * tensors[1].element_size()
        # the speed of memory: the same bytes read by two threads and added up
        same_bytes = torch.ones(size // 4)
        runs = {
            "ours": bench.ours(tensors),
            "reading the bytes": same_bytes.sum,
            "torch sdpa": bench.torch_sdpa(tensors, False),
        }
        if what == "float32":
            runs["ONNX Runtime GQA float32"] = group_query_attention(bench, single, bits=0, used=tokens - 1)
        yield from bench.compare(
            "decode", what, tokens, runs, work=size / 1e9, unit="GB/s",
            wanted={"reading the bytes": 0.8} if tokens >= 16384 else {}, rounds=bench.rounds * 3,
        )  # fmt: skip
    q, k, v = single
    codes = [torch.round(x / 0.02).clamp(-127, 127).to(torch.int8) for x in (k, v)]
    runs = {
        "ours": bench.ours([q, *codes], k_scale=scale, v_scale=scale),
        "ONNX Runtime GQA int8": group_query_attention(bench, [q, *codes], bits=8, used=tokens - 1),
    }
    yield from bench.compare(
        "decode", "int8", tokens, runs, work=elements / 1e9, unit="GB/s",
        wanted={"ONNX Runtime GQA int8": 1.0}, rounds=bench.rounds * 3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    slots = torch.stack(
        [torch.randperm(tokens, generator=generator)[:CHOSEN_SLOTS] for _ in range(bench.kv_heads)]
    )
    chosen = slots.unsqueeze(0).to(torch.int32)
    runs = {"ours": bench.ours(single, slots=chosen), "our dense": bench.ours(single)}
    size = 2 * bench.kv_heads * CHOSEN_SLOTS * bench.width * 4
    yield from bench.compare(
        "decode", f"{CHOSEN_SLOTS} chosen", tokens, runs, work=size / 1e9, unit="GB/s",
        wanted={"our dense": 12.0} if tokens >= 32768 else {}, rounds=bench.rounds * 3,
    )  # fmt: skip


def group_query_attention(bench: Bench, tensors: list[Any], *, bits: int, used: int) -> Run:
    """ONNX Runtime's GroupQueryAttention on the same numbers, over a shared buffer that holds `used`."""
    import numpy as np
    import onnx
    import onnxruntime

    helper, kinds = onnx.helper, onnx.TensorProto
    q, k, v = (x.numpy() for x in tensors)
    tokens, capacity = q.shape[2], k.shape[2]
    cache = kinds.INT8 if bits else kinds.FLOAT
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    floats = [(name, kinds.FLOAT, ["b", "t", name]) for name in names[:3]]
    caches = [(name, cache, ["b", "g", "s", "d"]) for name in names[3:5]]
    inputs = [*floats, *caches, ("last", kinds.INT32, ["b"]), ("total", kinds.INT32, [])]
    attributes: dict[str, Any] = {"num_heads": bench.heads, "kv_num_heads": bench.kv_heads}
    if bits:
        inputs += [("k_scale", kinds.FLOAT, ["n"]), ("v_scale", kinds.FLOAT, ["n"])]
        names += [""] * 5 + ["k_scale", "v_scale"]
        attributes |= {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": bits,
        }
    outputs = [("out", kinds.FLOAT, ["b", "t", "q"]), ("new_k", cache, [1] * 4), ("new_v", cache, [1] * 4)]
    node = helper.make_node(
        "GroupQueryAttention", names, [o[0] for o in outputs], domain="com.microsoft", **attributes
    )
    shown = [helper.make_tensor_value_info(n, t, [f"{n}{d}" for d in dims]) for n, t, dims in outputs]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(*i) for i in inputs], shown)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bench.threads
    options.log_severity_level = 3
    # its threads must not spin on while the other sides run
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()

    def packed(x: Any) -> Any:
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(1, x.shape[2], -1), dtype=np.float32)

    new = slice(used, used + tokens)
    feeds = {"q": packed(q), "k": packed(k[:, :, new]), "v": packed(v[:, :, new])}
    feeds |= {"last": np.array([used + tokens - 1], np.int32), "total": np.array(used + tokens, np.int32)}
    if bits:
        feeds |= {f"{n}_scale": np.full(bench.kv_heads * bench.width, 0.02, np.float32) for n in "kv"}
        feeds |= {"k": feeds["k"] * 0.02, "v": feeds["v"] * 0.02}
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for name, value in (("k", k), ("v", v)):
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(value[:, :, :capacity]))
        binding.bind_ortvalue_input(f"past_{name}", buffer)
        binding.bind_ortvalue_output(f"new_{name}", buffer)
    binding.bind_output("out")
    return lambda: session.run_with_iobinding(binding)


def block_loop(tensors: list[Any], blocks: Any) -> Run:
    """What can be had from torch without a kernel: gather the chosen keys, one sdpa a block of queries."""
    import torch

    q, k, v = tensors
    heads, group = q.shape[1], q.shape[1] // k.shape[1]

    def run() -> None:
        for head in range(heads):
            for i in range(blocks.shape[2]):
                rows = slice(i * BLOCK, (i + 1) * BLOCK)
                places = blocks[0, head, i].nonzero().flatten()
                keys = (places[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
                mask = keys <= torch.arange(rows.start, rows.stop)[:, None]
                torch.nn.functional.scaled_dot_product_attention(
                    q[0, head, rows], k[0, head // group, keys], v[0, head // group, keys], attn_mask=mask
                )

    return run


def flex_attention(tensors: list[Any], blocks: Any) -> Run | None:
    """FlexAttention under torch.compile over the same blocks; None where it does not compile."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    q, k, v = tensors

    def seen(_: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & blocks[0, head, query // BLOCK, key // BLOCK]

    try:
        tokens = q.shape[2]
        mask = create_block_mask(seen, 1, q.shape[1], tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
        compiled = torch.compile(flex)
        compiled(q, k, v, block_mask=mask, enable_gqa=True)
    except Exception as error:
        print(f"FlexAttention does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def roofline(threads: int) -> dict[str, float]:
    """What this machine does at best: matrix products of torch, and memory read."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        best = min(take_turns({"product": lambda a=a, b=b: a @ b}, 5)["product"])
        found[f"{str(dtype).removeprefix('torch.')} product, GFLOP/s"] = 2 * 2048**3 / best / 1e9
    memory = torch.ones(2**28)
    found["memory read, GB/s"] = 2**30 / min(take_turns({"read": memory.sum}, 5)["read"]) / 1e9
    found["threads"] = float(threads)
    return found


def run(tokens: Sequence[int], parts: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """All comparisons, as JSON values; progress goes to stderr."""
    import torch

    from memcompile.dialect.cpu_attention import cpu_library

    torch.set_num_threads(threads)
    library = cpu_library()
    assert library is not None, "there is no kernel library"
    found: list[Comparison] = []
    with torch.no_grad():
        for shape in SHAPES:
            for count in tokens:
                for part in parts:
                    print(f"{part}: {shape}, {count} tokens", file=sys.stderr)
                    bench = Bench(*shape, threads, rounds)
                    found += {"prefill": prefill, "sparse": sparse, "decode": decode}[part](bench, count)
        machine = roofline(threads)
    comparisons = [{**asdict(c), "passed": c.passed} for c in found]
    return {
        "schema": 1, "instruction_set": library.isa, "rounds": rounds, "roofline": machine,
        "comparisons": comparisons,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the comparisons as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"attention, kernels for {result['instruction_set']}")
    for heading in (
        "what",
        "heads",
        "tokens",
        "ours",
        "rate",
        "against",
        "",
        "faster",
        "spread",
        "wanted",
        "",
    ):
        table.add_column(heading, justify="left" if heading in ("what", "against") else "right", no_wrap=True)
    for c in result["comparisons"]:
        wanted = c["wanted"]
        table.add_row(
            f"{c['part']} {c['what']}", c["shape"], str(c["tokens"]), f"{c['ours_ms']:.2f} ms",
            f"{c['rate']:.0f} {c['unit']}", c["baseline"], f"{c['baseline_ms']:.2f} ms",
            f"{c['speedup']:.2f}x", f"{c['lowest']:.2f}-{c['highest']:.2f}",
            "" if wanted is None else f"{math.floor(wanted * 100) / 100:.2f}x",
            "" if wanted is None else "ok" if c["passed"] else "missed",
        )  # fmt: skip
    console = Console(width=170)
    console.print(table)
    console.print(", ".join(f"{name} {value:.0f}" for name, value in result["roofline"].items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", default="2048,8192,16384,32768", help="lengths")
    parser.add_argument("--only", choices=PARTS, help="one part of the three")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    parts = (options.only,) if options.only else PARTS
    result = run([int(t) for t in options.tokens.split(",")], parts, options.rounds, options.threads)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0 if all(c["passed"] for c in result["comparisons"]) else 1


if __name__ == "__main__":
    sys.exit(main())
