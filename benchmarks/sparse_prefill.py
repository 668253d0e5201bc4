"""Reading a prompt with `attention.sparse`: time and what it costs, at several prompt lengths.

Every preset is compiled once; every reading is a process of its own that reads the first tokens of a book,
then scores the 256 tokens that follow. Ratios and KL are against the model as it is, at the same length.

    python -m benchmarks.sparse_prefill [--json] [--model FILE] [--prompts 2000,4000,7500] [--presets NAME]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BOOK: Final = ROOT / "examples" / "texts" / "emma.txt.xz"
CALIBRATION: Final = ROOT / "examples" / "texts" / "persuasion.txt.xz"
SCORED_TOKENS: Final = 256
# budgets of the papers are made for 100,000 tokens: these fit prompts of 8,000
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "a_shape": {},
    "tri_shape": {},
    "block_topk": {"keep_tokens": 2048},
    "xattention": {},
    "minference": {},
}


def compile_all(model: str, folder: Path, presets: Sequence[str], prompt_tokens: int) -> None:
    """Write the artifact of the model as it is, and of every preset, into `folder`."""
    from memcompile import pipeline
    from memcompile.plan import load_plan

    for name in ("dense", *presets):
        print(f"compile {name} ...", file=sys.stderr, flush=True)
        passes = [] if name == "dense" else [{"attention.sparse": {"preset": name, **PRESETS[name]}}]
        plan: dict[str, Any] = {
            "version": 1,
            "model": {"source": model, "weights": "float32"},
            "target": {"backend": "onnxruntime", "device": "cpu", "threads": 2},
            "workload": {"prompt_tokens": prompt_tokens, "new_tokens": SCORED_TOKENS},
            "data": {"calibration": {"text": str(CALIBRATION), "tokens": 4096}},
            "passes": passes,
        }
        pipeline.optimize(model, load_plan(plan), folder / name, evaluate=False)


def read(artifact: Path, prompt_tokens: int, logits_file: Path) -> dict[str, float]:
    """Read the prompt, score what follows; the log-probabilities go to `logits_file`."""
    import lzma

    import numpy as np

    from memcompile.runtime import load

    session = load(artifact)
    with lzma.open(BOOK, "rt", encoding="utf-8") as file:
        tokens = session.tokenizer.encode(file.read(8 * prompt_tokens))[: prompt_tokens + SCORED_TOKENS]
    assert len(tokens) == prompt_tokens + SCORED_TOKENS, "the book is too short"
    state = session.new_state(1, prompt_tokens, SCORED_TOKENS)
    begin = time.perf_counter()
    session.prefill(state, [tokens[:prompt_tokens]])
    seconds = time.perf_counter() - begin
    # a few at a time: a longer call would choose again
    rows = [session.extend(state, tokens[i : i + 16]) for i in range(prompt_tokens, len(tokens), 16)]
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    np.save(logits_file, logits.astype(np.float32))
    expected = tokens[prompt_tokens + 1 :]
    loss = -logits[np.arange(len(expected)), expected].mean()
    return {"prefill_seconds": seconds, "perplexity": float(np.exp(loss))}


def run(model: str, prompts: Sequence[int], presets: Sequence[str], repeats: int) -> dict[str, Any]:
    """Compile, read in turns, compare; the result as JSON values."""
    import numpy as np

    rows = []
    with tempfile.TemporaryDirectory(prefix="memcompile-bench-") as name:
        folder = Path(name)
        compile_all(model, folder, presets, max(prompts))
        for prompt_tokens in prompts:
            found: dict[str, list[dict[str, float]]] = {}
            for _ in range(repeats):
                for each in ("dense", *presets):
                    print(f"{each}, {prompt_tokens} tokens ...", file=sys.stderr, flush=True)
                    command = [sys.executable, "-m", "benchmarks.sparse_prefill"]
                    command += ["--read", str(folder / each), "--logits", str(folder / f"{each}.npy")]
                    command += ["--prompts", str(prompt_tokens)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
                    found.setdefault(each, []).append(json.loads(done.stdout.splitlines()[-1]))
            dense = np.load(folder / "dense.npy")
            for each, readings in found.items():
                seconds = [r["prefill_seconds"] for r in readings]
                ratios = [s / r["prefill_seconds"] for s, r in zip(seconds, found["dense"], strict=True)]
                other = np.load(folder / f"{each}.npy")
                rows.append(
                    {
                        "preset": each,
                        "prompt_tokens": prompt_tokens,
                        "prefill_seconds": min(seconds),
                        "ratio": min(seconds) / min(r["prefill_seconds"] for r in found["dense"]),
                        "lowest": min(ratios),
                        "highest": max(ratios),
                        "perplexity": readings[0]["perplexity"],
                        "kl": float((np.exp(dense) * (dense - other)).sum(-1).mean()),
                    }
                )
    return {"schema": 1, "model": model, "repeats": repeats, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"reading a prompt, {result['repeats']} runs each")
    for heading in ("prompt", "preset", "first token", "ratio", "spread", "perplexity", "KL, nats"):
        table.add_column(heading, justify="left" if heading == "preset" else "right")
    for row in result["rows"]:
        table.add_row(
            str(row["prompt_tokens"]), row["preset"], f"{row['prefill_seconds']:.2f} s",
            f"{row['ratio']:.2f}", f"{row['lowest']:.2f}-{row['highest']:.2f}",
            f"{row['perplexity']:.2f}", f"{row['kl']:.4f}",
        )  # fmt: skip
    Console(width=100).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives 1 when a preset makes a prompt that it leaves dense more than 3% slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(MODEL), help="a Hugging Face folder or .gguf file")
    parser.add_argument("--prompts", default="2000,4000,7500", help="prompt lengths in tokens")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    prompts = [int(part) for part in options.prompts.split(",")]
    if options.read:
        print(json.dumps(read(options.read, prompts[0], options.logits)))
        return 0
    result = run(options.model, prompts, options.presets.split(","), options.repeats)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    short = [row for row in result["rows"] if row["prompt_tokens"] <= 2048]
    return 0 if all(row["ratio"] <= 1.03 for row in short) else 1


if __name__ == "__main__":
    sys.exit(main())
