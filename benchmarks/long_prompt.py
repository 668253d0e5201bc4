"""A long prompt, end to end: time to first token, a token after it, quality; our sides beside two rivals.

Every side is built once. Every reading is a process of its own, the sides taking turns: it reads the first
tokens of a book, then the 128 tokens that follow, one at a time for the first of them. Perplexity and KL are
of those tokens, KL against our float32 side at the same length; passkeys are hidden in the same number of
tokens. Ratios are of readings of the same turn.

    python -m benchmarks.long_prompt [--json] [--model FILE] [--prompts 8000] [--sides NAME ...]
    [--passkeys 10]      hide so many in prompts of the same length
    [--folder FOLDER]    keep what is built here, and build only what is missing

`genai` is onnxruntime-genai's own export in float32; `hf_float32` and `hf_bfloat16` are transformers
with sdpa.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import plain_export
from benchmarks.plain_export import MODEL, ROOT, answer_of, build_genai, prompt

BOOK: Final = ROOT / "examples" / "texts" / "emma.txt.xz"
CALIBRATION: Final = ROOT / "examples" / "texts" / "persuasion.txt.xz"
SCORED_TOKENS: Final = 128
# of the scored tokens, those that are timed
TIMED_TOKENS: Final = 32
REFERENCE: Final = "float32"
GENAI: Final = "genai"
HF: Final = {"hf_float32": "float32", "hf_bfloat16": "bfloat16"}

FLOATS: Final = {"weights": "float32"}
# the file's codes, inputs rounded to int8, attention in bfloat16
CODES: Final = {"dtype": "bfloat16", "weights": "stored", "activations": "int8"}
# budgets of the papers are made for 100,000 tokens: these fit prompts of 8,000
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "a_shape": {},
    "tri_shape": {},
    "block_topk": {"keep_tokens": 2048},
    "xattention": {},
    "minference": {},
}


def _sparse(model: dict[str, str], preset: str) -> dict[str, Any]:
    return {"model": model, "passes": [{"attention.sparse": {"preset": preset, **PRESETS[preset]}}]}


# our sides: sections of their plans
PLANS: Final[dict[str, dict[str, Any]]] = {
    REFERENCE: {"model": FLOATS},
    "bfloat16": {"model": {**FLOATS, "dtype": "bfloat16"}},
    "codes": {"model": CODES},
    "codes_kv8": {"model": CODES, "passes": [{"kv.quantize": {"bits": 8}}]},
    **{preset: _sparse(FLOATS, preset) for preset in PRESETS},
    **{f"codes_{preset}": _sparse(CODES, preset) for preset in PRESETS},
}
SIDES: Final = (*PLANS, GENAI, *HF)
DEFAULT_SIDES: Final = (
    REFERENCE, "bfloat16", "codes", "codes_kv8", "codes_a_shape", "codes_xattention", "codes_minference",
    GENAI, *HF,
)  # fmt: skip


def build(side: str, source: str, folder: Path, prompt_tokens: int, threads: int) -> None:
    """Write what a side runs into `folder`; transformers reads the source itself."""
    from memcompile import pipeline
    from memcompile.plan import load_plan

    if side == GENAI:
        build_genai(source, folder)
        return
    sections = PLANS[side]
    plan = {
        "version": 1,
        "model": {"source": source, **sections["model"]},
        "target": {"backend": "onnxruntime", "device": "cpu", "threads": threads},
        "workload": {"prompt_tokens": prompt_tokens, "new_tokens": SCORED_TOKENS},
        "data": {"calibration": {"text": str(CALIBRATION), "tokens": 4096}},
        "passes": sections.get("passes", []),
    }
    pipeline.optimize(source, load_plan(plan), folder, evaluate=False)


def book_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first tokens of the book."""
    import lzma

    with lzma.open(BOOK, "rt", encoding="utf-8") as file:
        tokens: list[int] = tokenizer.encode(file.read(8 * count))[:count]
    assert len(tokens) == count, "the book is too short"
    return tokens


def read_ours(artifact: Path, prompt_tokens: int, logits_file: Path, threads: int) -> dict[str, float]:
    """Read the prompt and score what follows; the log-probabilities go to `logits_file`."""
    import numpy as np

    from memcompile.evaluate.scoring import log_probabilities, token_losses
    from memcompile.runtime import load

    session = load(artifact, threads=threads)
    tokens = book_tokens(session.tokenizer, prompt_tokens + SCORED_TOKENS)
    state = session.new_state(1, prompt_tokens, SCORED_TOKENS)
    begin = time.perf_counter()
    session.prefill(state, [tokens[:prompt_tokens]])
    prefill = time.perf_counter() - begin
    session.compress(state)
    rows, times = [], []
    timed = prompt_tokens + TIMED_TOKENS
    for token in tokens[prompt_tokens:timed]:
        begin = time.perf_counter()
        rows.append(session.decode(state, np.array([token])))
        times.append(time.perf_counter() - begin)
    # a few at a time: a longer call would choose again
    rows += [session.extend(state, tokens[i : i + 16]) for i in range(timed, len(tokens), 16)]
    log = log_probabilities(np.concatenate(rows))
    np.save(logits_file, log)
    loss = token_losses(log[:-1], np.array(tokens[prompt_tokens + 1 :])).mean()
    return {
        "prefill_seconds": prefill,
        "decode_seconds": statistics.median(times),
        "perplexity": float(np.exp(loss)),
    }


def read_genai(folder: Path, prompt_tokens: int, threads: int) -> dict[str, float]:
    """The times of onnxruntime-genai."""
    found = plain_export.read_genai(folder, prompt_tokens, threads)
    return {"prefill_seconds": found.prefill_seconds, "decode_seconds": found.decode_seconds_per_token}


def read_hf(source: str, dtype: str, prompt_tokens: int, threads: int) -> dict[str, float]:
    """The times of transformers with sdpa: one call for the prompt, logits of its last token only."""
    import torch

    from memcompile.frontend import load_source

    torch.set_num_threads(threads)
    model: Any = load_source(source, dtype).module.eval()
    model.set_attn_implementation("sdpa")
    tokens = torch.tensor([prompt(model.config.vocab_size, prompt_tokens)])
    times = []
    with torch.inference_mode():
        begin = time.perf_counter()
        found = model(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - begin
        for _ in range(TIMED_TOKENS // 2):
            token = found.logits[:, -1:].argmax(-1)
            begin = time.perf_counter()
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
            times.append(time.perf_counter() - begin)
    return {"prefill_seconds": prefill, "decode_seconds": statistics.median(times)}


def find_passkeys(artifact: Path, prompt_tokens: int, count: int, threads: int) -> dict[str, float]:
    """How many of `count` passkeys, at even depths of as many tokens, are given back."""
    from memcompile.evaluate.passkey import measure_passkey
    from memcompile.runtime import load

    depths = [(index + 0.5) / count for index in range(count)]
    parameters = {"seed": 0, "prompt_tokens": prompt_tokens, "depths": depths}
    points = measure_passkey(load(artifact, threads=threads), parameters, lambda *_: None)["points"]
    return {"passkeys": sum(point["correct"] for point in points)}


def in_own_process(step: str, side: str, options: argparse.Namespace, prompt_tokens: int) -> dict[str, float]:
    """One step of this module in a fresh process; its last line is the answer."""
    print(f"{step} {side}, {prompt_tokens} tokens ...", file=sys.stderr, flush=True)
    arguments = ["--do", step, "--sides", side, "--model", options.model, "--folder", str(options.folder)]
    arguments += ["--prompts", str(prompt_tokens), "--passkeys", str(options.passkeys)]
    return answer_of("long_prompt", arguments, options.threads)


def do(options: argparse.Namespace) -> dict[str, float]:
    """One step of one side, in a process of its own."""
    (side,), prompt_tokens, threads = options.sides, options.prompts[0], options.threads
    artifact = options.folder / side
    if options.do == "build":
        build(side, options.model, artifact, prompt_tokens, threads)
        return {}
    if options.do == "passkeys":
        return find_passkeys(artifact, prompt_tokens, options.passkeys, threads)
    if side in HF:
        return read_hf(options.model, HF[side], prompt_tokens, threads)
    if side == GENAI:
        return read_genai(artifact, prompt_tokens, threads)
    return read_ours(artifact, prompt_tokens, options.folder / f"{side}.npy", threads)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build, read in turns, compare; the result as JSON values."""
    import numpy as np

    from memcompile.evaluate.scoring import kl_divergence

    sides = list(dict.fromkeys([REFERENCE, *options.sides]))
    rows = []
    for side in sides:
        if side not in HF and not (options.folder / side).exists():
            in_own_process("build", side, options, max(options.prompts))
    for prompt_tokens in options.prompts:
        readings: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side in sides:
                readings[side].append(in_own_process("read", side, options, prompt_tokens))
        reference = np.load(options.folder / f"{REFERENCE}.npy")
        for side, found in readings.items():
            row: dict[str, Any] = {"side": side, "prompt_tokens": prompt_tokens}
            for name in ("prefill_seconds", "decode_seconds"):
                row[name] = statistics.median(reading[name] for reading in found)
                for base in (REFERENCE, GENAI):
                    if base in readings:
                        pairs = zip(found, readings[base], strict=True)
                        ratios = [mine[name] / theirs[name] for mine, theirs in pairs]
                        row[f"{name}_to_{base}"] = [statistics.median(ratios), min(ratios), max(ratios)]
            if side in PLANS:
                log = np.load(options.folder / f"{side}.npy")
                row["perplexity"] = found[0]["perplexity"]
                row["kl"] = float(kl_divergence(reference, log).mean())
                if options.passkeys:
                    row |= in_own_process("passkeys", side, options, prompt_tokens)
            rows.append(row)
    return {"schema": 1, "model": Path(options.model).name, "repeats": options.repeats, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Print the rows as a Markdown table."""
    headings = ["prompt", "side", "first token", "/ float32", "/ genai", "a token", "/ float32"]
    headings += ["perplexity", "KL", "passkeys"]
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for row in result["rows"]:
        cells = [f"{row['prompt_tokens']:,}", row["side"], f"{row['prefill_seconds']:.2f} s"]
        cells += [_ratio(row, "prefill_seconds", REFERENCE), _ratio(row, "prefill_seconds", GENAI)]
        cells += [f"{row['decode_seconds'] * 1e3:.1f} ms", _ratio(row, "decode_seconds", REFERENCE)]
        ours = "perplexity" in row
        cells += [f"{row['perplexity']:.2f}", f"{row['kl']:.4f}"] if ours else ["", ""]
        cells.append(str(row.get("passkeys", "")))
        print("| " + " | ".join(cells) + " |")


def _ratio(row: dict[str, Any], name: str, base: str) -> str:
    found = row.get(f"{name}_to_{base}")
    return f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})" if found else ""


def targets(result: dict[str, Any]) -> dict[str, bool]:
    """What has to hold, and whether it does; of sides that were not measured nothing is said."""
    found = {}
    for prompt_tokens in dict.fromkeys(row["prompt_tokens"] for row in result["rows"]):
        rows = {row["side"]: row for row in result["rows"] if row["prompt_tokens"] == prompt_tokens}
        first = {side: row["prefill_seconds"] for side, row in rows.items()}
        at, dense = f"at {prompt_tokens:,} tokens", rows[REFERENCE]
        if GENAI in rows and prompt_tokens >= 8000:
            share = first[REFERENCE] / first[GENAI]
            found[f"first token {at}, dense float32: a third of onnxruntime-genai's"] = share <= 1 / 3
            good = [
                first[side] for side in rows if side.endswith(tuple(PRESETS)) and _keeps(rows[side], dense)
            ]
            share = min(good, default=float("inf")) / first[GENAI]
            found[f"first token {at}, best preset: a fifth of onnxruntime-genai's"] = share <= 1 / 5
        for ours, theirs in ((REFERENCE, "hf_float32"), ("bfloat16", "hf_bfloat16")):
            if {ours, theirs} <= rows.keys():
                found[f"first token {at}, {ours}: no later than transformers'"] = first[ours] <= first[theirs]
        if "codes_kv8" in rows:
            ratio = dense["decode_seconds"] / rows["codes_kv8"]["decode_seconds"]
            found[f"tokens a second {at}, codes_kv8: 1.5 times dense float32"] = ratio >= 1.5
        for preset in PRESETS:
            if preset in rows and prompt_tokens <= 2048:
                found[f"first token {at}, {preset}: at most 3% later"] = (
                    first[preset] <= 1.03 * first[REFERENCE]
                )
    return found


def _keeps(row: dict[str, Any], dense: dict[str, Any]) -> bool:
    """Whether a side loses at most 1% of perplexity and no passkey."""
    kept = row.get("passkeys", 0) >= dense.get("passkeys", 0)
    return bool(kept and row["perplexity"] <= 1.01 * dense["perplexity"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives 1 when something that has to hold does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(MODEL), help="a Hugging Face folder or .gguf file")
    parser.add_argument("--prompts", nargs="+", type=int, default=[8000], help="prompt lengths in tokens")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(DEFAULT_SIDES), metavar="SIDE")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--passkeys", type=int, default=0, help="passkeys a side and length; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep what is built here; what is there is not built")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--do", choices=("build", "read", "passkeys"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.do:
        print(json.dumps(do(options)))
        return 0
    with tempfile.TemporaryDirectory(prefix="memcompile-bench-") as name:
        options.folder = options.folder or Path(name)
        options.folder.mkdir(parents=True, exist_ok=True)
        result = run(options)
    reached = targets(result)
    if options.json:
        print(json.dumps({**result, "targets": reached}))
    else:
        show(result)
        for target, met in reached.items():
            print(f"{target}: {'reached' if met else 'MISSED'}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
