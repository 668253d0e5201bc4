"""The unmodified model: memcompile's artifact against onnxruntime-genai's own export.

Prefill, decode and peak memory at several prompt lengths. Every reading is a process of its own, the two
sides take turns, and the table gives the median ratio and its spread.

    python -m benchmarks.plain_export [--json] [--model FILE] [--prompts 2048,8000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS: Final = 32
SEED: Final = 0
SIDES: Final = ("genai", "memcompile")
LOWERING_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One run in one process."""

    side: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds_per_token: float
    peak_memory_bytes: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """memcompile's value over onnxruntime-genai's, run by run."""

    metric: str
    prompt_tokens: int
    genai: float
    memcompile: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    wanted: float | None

    @property
    def passed(self) -> bool:
        return self.wanted is None or self.ratio <= self.wanted


# never slower; at the longest prompt at most 60% of the memory
WANTED: Final = {"prefill_seconds": 1.0, "decode_seconds_per_token": 1.0, "peak_memory_bytes": 0.6}


def prompt(vocabulary: int, count: int) -> list[int]:
    """The same tokens on both sides; which ones does not change the work."""
    import numpy as np

    return [int(t) for t in np.random.default_rng(SEED).integers(100, vocabulary - 100, count)]


def read_memcompile(folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """Prefill and greedy decoding through the runtime."""
    import time

    import numpy as np

    from memcompile.runtime import load

    session = load(folder, threads=threads)
    tokens = prompt(session.manifest.model.vocab_size, prompt_tokens)
    state = session.new_state(1, prompt_tokens, NEW_TOKENS)
    start = time.perf_counter()
    (logits,) = session.prefill(state, [tokens])
    chosen = [int(logits[-1].argmax())]
    prefill = time.perf_counter() - start
    times = []
    for _ in range(NEW_TOKENS - 1):
        start = time.perf_counter()
        chosen.append(int(session.decode(state, np.array(chosen[-1:]))[0].argmax()))
        times.append(time.perf_counter() - start)
    return Reading("memcompile", prompt_tokens, prefill, statistics.median(times), _peak(), tuple(chosen))


def read_genai(folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """The same through onnxruntime-genai."""
    import time

    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = genai.Model(config)
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    tokens = prompt(vocabulary, prompt_tokens)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=prompt_tokens + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(np.array(tokens, np.int32))
    generator.generate_next_token()
    prefill = time.perf_counter() - start
    chosen = [int(generator.get_next_tokens()[0])]
    times = []
    while len(chosen) < NEW_TOKENS and not generator.is_done():
        start = time.perf_counter()
        generator.generate_next_token()
        times.append(time.perf_counter() - start)
        chosen.append(int(generator.get_next_tokens()[0]))
    decode = statistics.median(times) if times else float("nan")
    return Reading("genai", prompt_tokens, prefill, decode, _peak(), tuple(chosen))


def _peak() -> int:
    # not ru_maxrss: a process starts with its parent's value, and the parent holds a model
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def in_own_process(side: str, folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """Take one reading in a fresh process."""
    arguments = ["--read", side, "--artifact", str(folder), "--prompts", str(prompt_tokens)]
    values = answer_of("plain_export", arguments, threads)
    return Reading(**{**values, "tokens": tuple(values["tokens"])})


def answer_of(benchmark: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a benchmark of this folder in a fresh process; the last line that it prints is the answer."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--threads", str(threads), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{benchmark} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(readings: Sequence[Reading]) -> list[Comparison]:
    """Pair the runs of the two sides in the order they were taken."""
    found = []
    longest = max(r.prompt_tokens for r in readings)
    for prompt_tokens in dict.fromkeys(r.prompt_tokens for r in readings):
        for metric, wanted in WANTED.items():
            left, right = (
                [
                    float(getattr(r, metric))
                    for r in readings
                    if r.side == s and r.prompt_tokens == prompt_tokens
                ]
                for s in SIDES
            )
            ratios = [ours / theirs for theirs, ours in zip(left, right, strict=True)]
            found.append(
                Comparison(
                    metric,
                    prompt_tokens,
                    statistics.median(left),
                    statistics.median(right),
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                    wanted if metric != "peak_memory_bytes" or prompt_tokens == longest else None,
                )
            )
    return found


def export_both(source: str, folder: Path, threads: int) -> float:
    """Write both exports of one model into `folder`; gives the seconds of our capture and lowering."""
    import time

    import torch

    from memcompile.artifact import ArtifactWriter
    from memcompile.frontend import capture, load_source
    from memcompile.lowering import get_backend
    from memcompile.lowering.bundle import build_manifest
    from memcompile.program import build_program

    torch.set_num_threads(threads)
    model: Any = load_source(source, "float32").module
    start = time.perf_counter()
    captured = capture(model)
    program = build_program(captured)
    with ArtifactWriter(folder / "memcompile") as writer:
        lowered = get_backend("onnxruntime").lower(program, writer.path, device="cpu", progress=_quiet)
        took = time.perf_counter() - start
        writer.seal(
            build_manifest(
                captured.model, lowered, backend="onnxruntime", device="cpu", threads=threads, tokenizer=None,
                plan={}, calibrations={}, decisions=(), refusals=(),
            )
        )  # fmt: skip
        writer.commit()
    build_genai(source, folder / "genai")
    return took


def build_genai(source: str, folder: Path, precision: str = "fp32", *options: str) -> None:
    """Let onnxruntime-genai's own builder export the model into `folder`."""
    from memcompile.frontend import load_source

    model: Any = load_source(source, "float32").module
    with tempfile.TemporaryDirectory(prefix="memcompile-genai-") as name:
        checkpoint = Path(name) / "checkpoint"
        model.save_pretrained(checkpoint)
        _write_tokenizer(checkpoint)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        builder += ["-p", precision, "-e", "cpu", "-o", str(folder), "-c", str(Path(name) / "cache")]
        if options:
            builder += ["--extra_options", *options]
        done = subprocess.run(builder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed:\n{done.stderr[-2000:]}")


def _quiet(_: str) -> None:
    return None


def _write_tokenizer(folder: Path) -> None:
    # the builder wants one; which does not matter, the benchmark feeds token ids
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def run(source: str, prompts: Sequence[int], repeats: int, threads: int) -> dict[str, Any]:
    """Export, read, compare; the result as JSON values."""
    readings: list[Reading] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lowering_seconds = export_both(source, folder, threads)
        for prompt_tokens in prompts:
            for _ in range(repeats):
                readings += [in_own_process(s, folder / s, prompt_tokens, threads) for s in SIDES]
    comparisons = compare(readings)
    agree = all(
        len({r.tokens for r in readings if r.prompt_tokens == prompt_tokens}) == 1
        for prompt_tokens in prompts
    )
    return {
        "schema": 1,
        "model": source,
        "threads": threads,
        "repeats": repeats,
        "capture_and_lowering_seconds": lowering_seconds,
        "same_tokens": agree,
        "comparisons": [{**asdict(c), "passed": c.passed} for c in comparisons],
        "readings": [asdict(r) for r in readings],
    }


def show(result: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"plain export, {result['threads']} threads, {result['repeats']} runs a side")
    for heading in ("prompt", "metric", "genai", "memcompile", "ratio", "spread", "wanted", ""):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for c in result["comparisons"]:
        scale, unit = {"prefill_seconds": (1.0, "s"), "decode_seconds_per_token": (1e3, "ms")}.get(
            c["metric"], (2**-20, "MiB")
        )
        table.add_row(
            str(c["prompt_tokens"]),
            {"prefill_seconds": "prefill", "decode_seconds_per_token": "decode"}.get(c["metric"], "peak"),
            f"{c['genai'] * scale:.1f} {unit}",
            f"{c['memcompile'] * scale:.1f} {unit}",
            f"{c['ratio']:.2f}",
            f"{c['lowest_ratio']:.2f}-{c['highest_ratio']:.2f}",
            "" if c["wanted"] is None else f"<= {c['wanted']:.2f}",
            "" if c["wanted"] is None else "ok" if c["passed"] else "missed",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"capture and lowering: {result['capture_and_lowering_seconds']:.1f} s (wanted: under 60 s)"
    )
    console.print(
        "both sides chose the same tokens" if result["same_tokens"] else "the sides chose different tokens"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(MODEL), help="a Hugging Face folder or .gguf file")
    parser.add_argument("--prompts", default="2048,8000", help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    prompts = [int(part) for part in options.prompts.split(",")]
    if options.read:
        read = read_genai if options.read == "genai" else read_memcompile
        print(json.dumps(asdict(read(options.artifact, prompts[0], options.threads))))
        return 0
    result = run(options.model, prompts, options.repeats, options.threads)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    reached = all(c["passed"] for c in result["comparisons"]) and result["same_tokens"]
    return 0 if reached and result["capture_and_lowering_seconds"] < LOWERING_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
