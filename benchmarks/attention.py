"""Attention alone: our CPU kernels beside torch's and ONNX Runtime's, in one run and in turns.

Every row is one comparison. The two sides take turns in rounds; the table gives the best time of each, the
ratio of the best times, and the ratios of the single rounds from the lowest to the highest. Rounds go on for
`--budget` seconds a comparison at most; what does not fit once is measured once, without a round before it.

    python -m benchmarks.attention [--json] [--rounds 5] [--tokens 2048,8192] [--heads 9,32]
                                   [--only prefill|sparse|decode] [--budget 8]
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

from benchmarks.attention_ort import group_query_attention, sparse_attention

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
# seconds that the rounds of one comparison may take
BUDGET: Final = 8.0


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


def take_turns(runs: dict[str, Run], rounds: int, budget: float = BUDGET) -> dict[str, list[float]]:
    """Seconds of each run in each round, as many as `budget` has room for.

    A first round that warms up is not counted, unless there is no time for another.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn and (time.perf_counter() - began) * (turn + 1) / turn > budget:
            break
        for name, run in runs.items():
            # let the threads of the one before stop spinning, and wake those of this one
            time.sleep(SETTLE_SECONDS)
            spent = SHORT_SECONDS if turn == 0 else min(seconds[name], default=0.0)
            if spent < SHORT_SECONDS:
                run()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: spent[1:] or spent for name, spent in seconds.items()}


class Bench:
    """The tensors and the implementations of one shape."""

    def __init__(
        self, heads: int, kv_heads: int, width: int, threads: int, rounds: int, budget: float
    ) -> None:
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.threads, self.rounds, self.budget = threads, rounds, budget
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
        seconds = take_turns(runs, rounds or self.rounds, self.budget)
        ours = seconds.pop("ours")
        for name, theirs in seconds.items():
            yield self.row(part, what, tokens, ours, name, theirs, work, unit, wanted.get(name))

    def row(
        self, part: str, what: str, tokens: int, ours: list[float], name: str, theirs: list[float],
        work: float, unit: str, wanted: float | None,
    ) -> Comparison:  # fmt: skip
        """One comparison of seconds that were taken in the same rounds."""
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        return Comparison(
            part, what, self.shape, tokens, min(ours) * 1e3, name, min(theirs) * 1e3,
            min(theirs) / min(ours), min(ratios), max(ratios), work / min(ours), unit, wanted,
        )  # fmt: skip


def prefill(bench: Bench, tokens: int) -> Iterator[Comparison]:
    """Dense causal prefill in float32 and bfloat16."""
    import torch

    flops = 2 * bench.heads * bench.width * tokens * tokens
    single, half = (bench.tensors(tokens, tokens, t) for t in (torch.float32, torch.bfloat16))
    for what, tensors, wanted in (("float32", single, 1.0), ("bfloat16", half, 2.0)):
        runs = {"ours": bench.ours(tensors), "torch sdpa": bench.torch_sdpa(tensors, True)}
        wants = {"torch sdpa": wanted}
        if tokens <= 8192 and bench.heads == 9:
            runs["ONNX Runtime GQA float32"] = group_query_attention(bench, single, bits=0, used=0)
            wants["ONNX Runtime GQA float32"] = 1.4
        yield from bench.compare(
            "prefill", what, tokens, runs, work=flops / 1e9, unit="GFLOP/s", wanted=wants
        )


def sparse(bench: Bench, tokens: int) -> Iterator[Comparison]:
    """Blocks of keys chosen at random at several densities, and a window, against our own dense kernel."""
    import torch

    flops = 2 * bench.heads * bench.width * tokens * tokens
    tensors = bench.tensors(tokens, tokens, torch.float32)
    count = -(-tokens // BLOCK)
    causal = torch.ones(count, count).tril().bool()
    seen = WINDOW + SINKS
    # dense is run once a round for all of them
    runs = {"our dense": bench.ours(tensors)}
    rows: dict[str, tuple[float, float | None]] = {}
    for density in DENSITIES:
        generator = torch.Generator().manual_seed(1)
        blocks = (torch.rand(1, bench.heads, count, count, generator=generator) < density) & causal
        blocks |= torch.eye(count).bool()
        real = float((blocks & causal).sum() / (bench.heads * causal.sum()))
        what, work = f"blocks, {real:.1%}", flops * real / 1e9
        runs[what] = bench.ours(tensors, blocks=blocks, block_tokens=BLOCK)
        rows[what] = work, 0.85 / real
        if density == 0.12 and tokens <= 8192 and bench.heads == 9:
            others = {
                "ours": runs[what],
                "torch, one sdpa a block": block_loop(tensors, blocks),
                "ONNX Runtime SparseAttention": sparse_attention(bench, tensors, blocks),
            }
            if (flex := flex_attention(tensors, blocks)) is not None:
                others["torch FlexAttention, compiled"] = flex
            yield from bench.compare("sparse", what, tokens, others, work=work, unit="GFLOP/s", wanted={})
    what = f"window {WINDOW}+{SINKS}"
    runs[what] = bench.ours(tensors, window=WINDOW, sinks=SINKS)
    work = 4 * bench.heads * bench.width * (seen * tokens - seen * seen / 2) / 1e9
    rows[what] = work, 6.0 if tokens >= 16384 else None
    seconds = take_turns(runs, bench.rounds, bench.budget)
    for what, (work, wanted) in rows.items():
        yield bench.row(
            "sparse", what, tokens, seconds[what], "our dense", seconds["our dense"], work, "GFLOP/s", wanted
        )


def decode(bench: Bench, tokens: int) -> Iterator[Comparison]:
    """One query over a long cache: read at the speed of memory, in codes, or over chosen slots."""
    import torch

    elements = 2 * bench.kv_heads * tokens * bench.width
    scale = torch.full((bench.kv_heads * bench.width,), 0.02)
    single = bench.tensors(1, tokens, torch.float32)
    for what, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        tensors = bench.tensors(1, tokens, dtype)
        size = elements * tensors[1].element_size()
        # the speed of memory, which is not the same everywhere: these very bytes read and added up
        words = [x.view(torch.float32) for x in tensors[1:]]
        runs = {
            "ours": bench.ours(tensors),
            "reading the bytes": lambda words=words: [x.sum() for x in words],
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


def run(
    tokens: Sequence[int],
    heads: Sequence[int],
    parts: Sequence[str],
    rounds: int,
    threads: int,
    budget: float,
) -> dict[str, Any]:
    """All comparisons, as JSON values; progress goes to stderr."""
    import torch

    from memcompile.dialect.cpu_attention import cpu_library

    torch.set_num_threads(threads)
    library = cpu_library()
    assert library is not None, "there is no kernel library"
    found: list[Comparison] = []
    with torch.no_grad():
        for shape in (shape for shape in SHAPES if shape[0] in heads):
            for count in tokens:
                for part in parts:
                    print(f"{part}: {shape}, {count} tokens", file=sys.stderr)
                    bench = Bench(*shape, threads, rounds, budget)
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
    parser.add_argument("--heads", default="9,32", help="query heads of the shapes")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of one comparison")
    parser.add_argument("--only", choices=PARTS, help="one part of the three")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    parts = (options.only,) if options.only else PARTS
    tokens, heads = ([int(x) for x in text.split(",")] for text in (options.tokens, options.heads))
    result = run(tokens, heads, parts, options.rounds, options.threads, options.budget)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0 if all(c["passed"] for c in result["comparisons"]) else 1


if __name__ == "__main__":
    sys.exit(main())
