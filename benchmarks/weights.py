"""Weights in fewer bits: size, quality, speed and memory, beside OpenVINO GenAI and onnxruntime-genai int4.

Every reading is a process of its own; the sides take turns, so that what else the machine does falls on all
of them. Ratios are of readings taken in the same turn.

    python -m benchmarks.weights [--json] [--model FILE.gguf] [--prompt 2048] [--repeats 3] [--sides ...]
    [--folder FOLDER]    keep the artifacts here, and build only those that are missing
    [--text FILE]        score another text than Persuasion
    [--quality-only]     no readings: quality does not depend on what else the machine does
    [--readings-only]    no quality, and no float side unless it is asked for

Peak memory at 8,000 tokens:  python -m benchmarks.weights --readings-only --prompt 8000 --repeats 1
                                  --sides gguf_int8_kv8 openvino

`--model` is SmolLM2-135M-Instruct, or any other GGUF file: `make results-weights-gemma` takes Gemma 3 270M.
OpenVINO GenAI is measured when the package openvino-genai is installed; it reads the same GGUF file. Quality
is measured of our own artifacts only: the other two give no logits for a given text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks._weight_sides import (
    REFERENCE,
    RIVALS,
    SIDES,
    TEXT,
    WINDOW_TOKENS,
    build_ours,
    measure_quality,
    read_genai,
    read_openvino,
    read_ours,
    weight_bytes,
)
from benchmarks.plain_export import MODEL, answer_of, build_genai

LONG_PROMPT_TOKENS: Final = 8000


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build every side, measure quality, then take the readings in turns; the result as JSON values."""
    sides = list(dict.fromkeys([*([] if options.readings_only else [REFERENCE]), *options.sides]))
    if options.quality_only:
        sides = [side for side in sides if side not in RIVALS]
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
                answer_of("weights", ["--do", "build", *arguments], options.threads)
            found["weight_bytes"][side] = weight_bytes(side, artifact, options.model)
            if side not in RIVALS and not options.readings_only:
                place = "--keep" if side == REFERENCE else "--reference"
                more = [place, str(kept), "--windows", str(options.windows)]
                more += ["--passkey", str(options.passkey), "--text", str(options.text)]
                done = answer_of("weights", ["--do", "quality", *arguments, *more], options.threads)
                found["quality"][side] = done
                print(f"{side}: {json.dumps(done)}", file=sys.stderr)
        repeats = 0 if options.quality_only else options.repeats
        for turn in range(repeats):
            print(f"turn {turn + 1} of {repeats}", file=sys.stderr)
            for side in list(sides):
                arguments = ["--do", "read", "--side", side, "--artifact", str(artifacts[side])]
                arguments += ["--model", options.model, "--prompt", str(options.prompt)]
                try:
                    found["readings"].append(answer_of("weights", arguments, options.threads))
                except RuntimeError as error:
                    # not every rival knows every model
                    if side not in RIVALS or turn:
                        raise
                    print(f"{side} does not run {options.model} and is left out: {error}", file=sys.stderr)
                    sides.remove(side)
    return {
        "schema": 1,
        "model": Path(options.model).name,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "repeats": options.repeats,
        "windows": options.windows,
        "passkey_tokens": options.passkey,
        "text": Path(options.text).name,
        "sides": sides,
        **found,
    }


def do(options: argparse.Namespace) -> dict[str, Any]:
    """One step, in a process of its own."""
    if options.do == "build":
        if options.side == "genai_int4":
            build_genai(options.model, options.artifact, "int4", "int4_accuracy_level=4")
        else:
            build_ours(options.side, options.model, options.artifact, options.threads)
        return {}
    if options.do == "quality":
        measured = measure_quality(
            options.artifact,
            options.reference,
            options.keep,
            options.windows,
            options.passkey,
            options.threads,
            options.text,
        )
        return asdict(measured)
    place = Path(options.model) if options.side == "openvino" else options.artifact
    read = {"openvino": read_openvino, "genai_int4": read_genai}.get(options.side, read_ours)
    return asdict(read(options.side, place, options.prompt, options.threads))


def targets(result: dict[str, Any]) -> dict[str, bool]:
    """What has to hold, and whether it does; of sides that were not measured nothing is said."""
    quality, found = result["quality"], {}
    perplexities = {side: each["perplexity"] for side, each in quality.items()}
    for bits, name, limit in ((8, "int8", 0.5), (4, "int4", 3)):
        ours = [value for side, value in perplexities.items() if side.startswith(name)]
        if ours:
            best = min(ours) <= (1 + limit / 100) * perplexities[REFERENCE]
            found[f"{bits} bits, best method: perplexity within {limit}%"] = best
    if "gguf" in quality:
        found["GGUF's own codes: KL below 1e-6"] = quality["gguf"]["kl"] < 1e-6
    read = {reading["side"] for reading in result["readings"]}
    if {"openvino", "gguf_int8"} <= read:
        found["GGUF's own codes, int8 activations: a token no slower than OpenVINO GenAI"] = (
            _ratio(result, "decode_seconds_per_token", "gguf_int8", "openvino") <= 1
        )
    if {"openvino", "gguf_int8_kv8"} <= read and result["prompt_tokens"] >= LONG_PROMPT_TOKENS:
        found["peak memory of a long prompt with int8 keys and values: at most 80% of OpenVINO GenAI's"] = (
            _ratio(result, "peak_memory_bytes", "gguf_int8_kv8", "openvino") <= 0.8
        )
    return found


def _paired(result: dict[str, Any], metric: str, side: str, against: str) -> list[list[float]]:
    return [[r[metric] for r in result["readings"] if r["side"] == one] for one in (side, against)]


def _ratio(result: dict[str, Any], metric: str, side: str, against: str) -> float:
    mine, theirs = _paired(result, metric, side, against)
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


METRICS: Final = {
    "prefill_seconds": ("first token", 1.0, "s", 2),
    "decode_seconds_per_token": ("a token", 1e3, "ms", 1),
    "peak_memory_bytes": ("peak", 2**-20, "MiB", 0),
}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table: a heading, then a row a side; what was not asked for has no columns."""
    against = next(side for side in ("openvino", REFERENCE, *result["sides"]) if side in result["sides"])
    heading = ["weights", "MiB"]
    if result["quality"]:
        heading += ["perplexity", "KL", "same top token", "passkey"]
    if result["readings"]:
        heading += [cell for title, *_ in METRICS.values() for cell in (title, f"/ {against}")]
    table = [heading]
    for side in result["sides"]:
        row = [side, f"{result['weight_bytes'][side] / 2**20:.0f}"]
        if result["quality"]:
            row += _quality_cells(result["quality"].get(side))
        if result["readings"]:
            row += _reading_cells(result, side, against)
        table.append(row)
    return table


def _quality_cells(quality: dict[str, Any] | None) -> list[str]:
    if quality is None:
        return ["–"] * 4
    passkey = quality["passkey"]
    return [
        f"{quality['perplexity']:.2f}",
        f"{quality['kl']:.4f}",
        f"{quality['same_top_token']:.1%}",
        "–" if passkey is None else f"{passkey:.0%}",
    ]


def _reading_cells(result: dict[str, Any], side: str, against: str) -> list[str]:
    cells = []
    for metric, (_, scale, unit, digits) in METRICS.items():
        mine, theirs = _paired(result, metric, side, against)
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        cells.append(f"{statistics.median(mine) * scale:.{digits}f} {unit}")
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
    return cells


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
    parser.add_argument("--passkey", type=int, default=1024, help="length of its prompts; 0: not asked for")
    parser.add_argument("--text", type=Path, default=TEXT, help="what the windows are cut from")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quality-only", action="store_true", help="take no readings")
    only.add_argument("--readings-only", action="store_true", help="measure no quality")
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
        f"{result['repeats']} turns; quality on {result['windows']} windows of {WINDOW_TOKENS} tokens of "
        f"{result['text']}, "
        f"passkeys in {result['passkey_tokens']}\n"
    )
    print(markdown(result) + "\n")
    for target, met in reached.items():
        print(f"{target}: {'reached' if met else 'MISSED'}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
