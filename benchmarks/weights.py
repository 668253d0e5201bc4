"""Weights in fewer bits: size, quality, speed and memory, beside OpenVINO GenAI and onnxruntime-genai int4.

Every reading is a process of its own; the sides take turns, so that what else the machine does falls on all
of them. Ratios are of readings taken in the same turn.

    python -m benchmarks.weights [--json] [--model FILE.gguf] [--prompt 2048] [--repeats 3] [--sides ...]
    [--folder FOLDER]    keep the artifacts here, and build only those that are missing

OpenVINO GenAI is measured when the package openvino-genai is installed; it reads the same GGUF file. Quality
is measured of our own artifacts only: the other two give no logits for a given text.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from benchmarks.plain_export import MODEL, ROOT, prompt

NEW_TOKENS: Final = 32
TEXT: Final = ROOT / "examples" / "texts" / "persuasion.txt.xz"
WINDOW_TOKENS: Final = 512
REFERENCE: Final = "fp32"
RIVALS: Final = ("openvino", "genai_int4")
# another text than the one that quality is measured on
CALIBRATION: Final = {"text": str(ROOT / "examples" / "texts" / "emma.txt.xz"), "tokens": 8192}


def _quantized(*passes: dict[str, Any]) -> dict[str, Any]:
    """Sections of a plan that quantises the floats a file stands for."""
    return {
        "model": {"weights": "float32"},
        "data": {"calibration": CALIBRATION},
        "passes": [{"weights.quantize": one} for one in passes],
    }


def _layers(**config: Any) -> dict[str, Any]:
    """The same with head and embedding at 8 bits: a tied table of a small model does not bear 4."""
    table = {"preset": "int8", "zero_point": "integer", "modules": ["lm_head", "model.embed_tokens"]}
    return _quantized(table, {**config, "layers": "all"})


# our sides: sections of their plans
PLANS: Final[dict[str, dict[str, Any]]] = {
    "fp32": {"model": {"weights": "float32"}},
    "int8": _quantized({"preset": "int8"}),
    "int8_smooth": _quantized({"preset": "int8_smooth"}),
    "int8_smoothquant": _quantized({"preset": "int8_smoothquant"}),
    "int8_mptq": _quantized({"preset": "int8_mptq"}),
    "int4_rtn": _quantized({"preset": "int4"}),
    "int4_hqq": _quantized({"preset": "int4_hqq"}),
    # these leave head and embedding at 8 bits
    "int4_rtn_head8": _layers(preset="int4"),
    "int4_awq": _layers(preset="int4_awq"),
    "int4_gptq": _layers(preset="int4_gptq"),
    "int4_awq_gptq": _layers(preset="int4_awq_gptq"),
    "int4_kmeans": _layers(preset="int4_kmeans"),
    "int4_offsets": _layers(preset="int4", zero_point="float"),
    "mixed_5bit": _quantized({"preset": "mixed_5bit"}),
    "gguf": {"model": {"weights": "stored", "activations": "float"}},
    "gguf_int8": {"model": {"weights": "stored", "activations": "int8"}},
}
SIDES: Final = (*PLANS, *RIVALS)


@dataclass(frozen=True, slots=True)
class Reading:
    """One run of one side in one process."""

    side: str
    prefill_seconds: float
    decode_seconds_per_token: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity, and how far the predictions are from those of the float weights, in nats a token."""

    perplexity: float
    kl: float
    same_top_token: float


def build_ours(side: str, source: str, folder: Path, threads: int) -> None:
    """Compile one of our sides into `folder`."""
    from memcompile import pipeline
    from memcompile.plan import load_plan

    sections = PLANS[side]
    plan = load_plan(
        {
            "version": 1,
            "model": {"source": source, **sections["model"]},
            "target": {"backend": "onnxruntime", "threads": threads},
            "workload": {"prompt_tokens": 2048, "new_tokens": NEW_TOKENS},
            "data": sections.get("data", {}),
            "passes": sections.get("passes", []),
        }
    )
    pipeline.optimize(source, plan, folder, evaluate=False)


def build_genai(source: str, folder: Path) -> None:
    """Let onnxruntime-genai's own builder quantise the model to int4."""
    from memcompile.frontend import load_source

    loaded: Any = load_source(source, "float32")
    checkpoint = folder.with_name("checkpoint")
    loaded.module.save_pretrained(checkpoint)
    loaded.tokenizer.save_pretrained(checkpoint)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-p", "int4"]
    command += ["-e", "cpu", "-o", str(folder), "-c", str(folder.with_name("cache"))]
    command += ["--extra_options", "int4_accuracy_level=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed:\n{done.stderr[-2000:]}")


def read_ours(side: str, folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """Prefill and greedy decoding through the runtime."""
    from benchmarks.plain_export import read_memcompile

    found = read_memcompile(folder, prompt_tokens, threads)
    return Reading(side, found.prefill_seconds, found.decode_seconds_per_token, found.peak_memory_bytes)


def read_genai(side: str, folder: Path, prompt_tokens: int, threads: int) -> Reading:
    """The same through onnxruntime-genai."""
    from benchmarks.plain_export import read_genai as read

    found = read(folder, prompt_tokens, threads)
    return Reading(side, found.prefill_seconds, found.decode_seconds_per_token, found.peak_memory_bytes)


def read_openvino(side: str, model: Path, prompt_tokens: int, threads: int) -> Reading:
    """The same through OpenVINO GenAI, which reads the GGUF file itself; its own clocks, in float32."""
    import numpy as np
    import openvino
    import openvino_genai

    from benchmarks.plain_export import _peak

    pipe = openvino_genai.LLMPipeline(
        str(model), "CPU", INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT="f32"
    )
    tokens = np.array([prompt(40_000, prompt_tokens)], np.int64)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = NEW_TOKENS, True, False
    metrics = pipe.generate(openvino.Tensor(tokens), config).perf_metrics
    return Reading(side, metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3, _peak())


def measure_quality(
    folder: Path, reference: Path | None, keep: Path | None, windows: int, threads: int
) -> Quality:
    """Score windows of the text; `reference` holds log-probabilities that another side kept."""
    import lzma

    import numpy as np

    from memcompile.runtime import load

    session = load(folder, threads=threads)
    with lzma.open(TEXT, "rt", encoding="utf-8") as file:
        tokens = session.tokenizer.encode(file.read(windows * WINDOW_TOKENS * 8))
    losses, divergences, same = [], [], []
    for index in range(windows):
        row = tokens[index * WINDOW_TOKENS : (index + 1) * WINDOW_TOKENS]
        state = session.new_state(1, WINDOW_TOKENS, 1)
        (logits,) = session.prefill(state, [row], all_logits=True)
        top = logits.max(axis=-1, keepdims=True)
        log = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        losses.append(-log[np.arange(len(row) - 1), row[1:]])
        if keep is not None:
            np.save(keep / f"{index}.npy", log)
        if reference is not None:
            wanted = np.load(reference / f"{index}.npy")
            divergences.append((np.exp(wanted) * (wanted - log)).sum(axis=-1))
            same.append(wanted.argmax(axis=-1) == log.argmax(axis=-1))
    kl = float(np.concatenate(divergences).mean()) if divergences else 0.0
    agree = float(np.concatenate(same).mean()) if same else 1.0
    return Quality(float(np.exp(np.concatenate(losses).mean())), kl, agree)


def weight_bytes(side: str, folder: Path, source: str) -> int:
    """Bytes of the files that hold the weights."""
    if side == "openvino":
        return Path(source).stat().st_size
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".bin", ".data"))


def in_own_process(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run this module's own `--do` in a fresh process; its last line is the answer."""
    command = [sys.executable, "-m", "benchmarks.weights", "--threads", str(threads), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build every side, measure quality, then take the readings in turns; the result as JSON values."""
    sides = list(dict.fromkeys([REFERENCE, *options.sides]))
    if "openvino" in sides and importlib.util.find_spec("openvino_genai") is None:
        print("openvino-genai is not installed: its side is left out", file=sys.stderr)
        sides.remove("openvino")
    found: dict[str, Any] = {"quality": {}, "weight_bytes": {}, "readings": []}
    with tempfile.TemporaryDirectory(prefix="memcompile-weights-") as name:
        kept, folder = Path(name) / "log-probabilities", options.folder or Path(name)
        kept.mkdir()
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = {side: folder / side for side in sides}
        for side, artifact in artifacts.items():
            arguments = ["--side", side, "--model", options.model, "--artifact", str(artifact)]
            if side != "openvino" and not artifact.exists():
                print(f"build {side}", file=sys.stderr)
                in_own_process(["--do", "build", *arguments], options.threads)
            found["weight_bytes"][side] = weight_bytes(side, artifact, options.model)
            if side not in RIVALS:
                place = "--keep" if side == REFERENCE else "--reference"
                more = [place, str(kept), "--windows", str(options.windows)]
                done = in_own_process(["--do", "quality", *arguments, *more], options.threads)
                found["quality"][side] = done
        for turn in range(options.repeats):
            print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr)
            for side, artifact in artifacts.items():
                arguments = ["--do", "read", "--side", side, "--artifact", str(artifact)]
                arguments += ["--model", options.model, "--prompt", str(options.prompt)]
                found["readings"].append(in_own_process(arguments, options.threads))
    return {
        "schema": 1,
        "model": Path(options.model).name,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "repeats": options.repeats,
        "windows": options.windows,
        "sides": sides,
        **found,
    }


def do(options: argparse.Namespace) -> dict[str, Any]:
    """One step, in a process of its own."""
    if options.do == "build":
        if options.side == "genai_int4":
            build_genai(options.model, options.artifact)
        else:
            build_ours(options.side, options.model, options.artifact, options.threads)
        return {}
    if options.do == "quality":
        measured = measure_quality(
            options.artifact, options.reference, options.keep, options.windows, options.threads
        )
        return asdict(measured)
    place = Path(options.model) if options.side == "openvino" else options.artifact
    read = {"openvino": read_openvino, "genai_int4": read_genai}.get(options.side, read_ours)
    return asdict(read(options.side, place, options.prompt, options.threads))


def targets(result: dict[str, Any]) -> dict[str, bool]:
    """What has to hold, and whether it does; of sides that were not measured nothing is said."""
    quality, found = result["quality"], {}
    float_weights = quality[REFERENCE]["perplexity"]
    eight = [each["perplexity"] for side, each in quality.items() if side.startswith("int8")]
    if eight:
        found["8 bits, best method: perplexity within 0.5%"] = min(eight) <= 1.005 * float_weights
    four = [each["perplexity"] for side, each in quality.items() if side.startswith("int4")]
    if four:
        found["4 bits, best method: perplexity within 3%"] = min(four) <= 1.03 * float_weights
    if "gguf" in quality:
        found["GGUF's own codes: KL below 1e-6"] = quality["gguf"]["kl"] < 1e-6
    if {"openvino", "gguf_int8"} <= set(result["sides"]):
        found["GGUF's own codes, int8 activations: a token no slower than OpenVINO GenAI"] = (
            _ratio(result, "decode_seconds_per_token", "gguf_int8", "openvino") <= 1
        )
    return found


def _ratio(result: dict[str, Any], metric: str, side: str, against: str) -> float:
    mine, theirs = ([r[metric] for r in result["readings"] if r["side"] == one] for one in (side, against))
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


METRICS: Final = {
    "prefill_seconds": ("first token", 1.0, "s", 2),
    "decode_seconds_per_token": ("a token", 1e3, "ms", 1),
    "peak_memory_bytes": ("peak", 2**-20, "MiB", 0),
}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table: a heading, then a row a side."""
    against = "openvino" if "openvino" in result["sides"] else REFERENCE
    heading = ["weights", "MiB", "perplexity", "KL", "same top token"]
    for title, *_ in METRICS.values():
        heading += [title, f"/ {against}"]
    table = [heading]
    for side in result["sides"]:
        quality = result["quality"].get(side)
        row = [side, f"{result['weight_bytes'][side] / 2**20:.0f}"]
        row += (
            ["–", "–", "–"]
            if quality is None
            else [f"{quality['perplexity']:.2f}", f"{quality['kl']:.4f}", f"{quality['same_top_token']:.1%}"]
        )
        for metric, (_, scale, unit, digits) in METRICS.items():
            mine, theirs = (
                [r[metric] for r in result["readings"] if r["side"] == one] for one in (side, against)
            )
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            row.append(f"{statistics.median(mine) * scale:.{digits}f} {unit}")
            row.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        table.append(row)
    return table


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    heading, *rows = rows_of(result)
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(MODEL), help="a .gguf file")
    parser.add_argument("--prompt", type=int, default=2048, help="prompt length in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {WINDOW_TOKENS} tokens to score")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", type=Path, help="keep artifacts here; those that are there are not built")
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    parser.add_argument("--do", choices=("build", "quality", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    for name in ("--artifact", "--reference", "--keep"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.do:
        print(json.dumps(do(options)))
        return 0
    result = run(options)
    reached = targets(result)
    if options.json:
        print(json.dumps({**result, "targets": reached}))
        return 0 if all(reached.values()) else 1
    print(
        f"{result['model']}: {result['prompt_tokens']} prompt tokens, {result['threads']} threads, "
        f"{result['repeats']} turns; quality on {result['windows']} windows of {WINDOW_TOKENS} tokens\n"
    )
    print(markdown(result) + "\n")
    for target, met in reached.items():
        print(f"{target}: {'reached' if met else 'MISSED'}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
