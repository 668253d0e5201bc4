"""The plans that `memcompile plan init` writes: one a goal, with the reasons as comments."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

GOALS: Final[dict[str, str]] = {
    "memory": "a small cache: keep the best tokens of the prompt, in 8 bits",
    "speed": "fast decoding at long prompts: most layers look at a window",
    "quality": "as close to the original as it gets, with a cache a quarter the size",
}
_MOST_PROMPT_TOKENS: Final = 4096
_SPARE_TOKENS: Final = 128
_TEXT_TOKENS: Final = 16384


def starter_plan(
    inspected: Mapping[str, Any],
    goal: str,
    *,
    source: str,
    folder: Path,
    text: Path | None = None,
    calibration_text: Path | None = None,
) -> str:
    """A commented plan for a model that was inspected; paths are written relative to `folder`."""
    causal = [region for region in inspected["regions"] if region["mask"] in ("causal", "sliding_window")]
    prompt = _prompt_tokens(inspected)
    # what a window already bounds needs no eviction
    unbounded = [region for region in causal if region["mask"] == "causal"]
    parts = [
        f"# {goal}: {GOALS[goal]}.",
        f"# Model: {_describe(inspected)}",
        "version: 1",
        f"model:    {{source: {_quoted(_relative(source, folder))}, dtype: float32}}",
        "target:   {backend: onnxruntime, device: cpu}  # threads: all cores, unless given",
        "# What cost is predicted for and speed is measured at. Set it to your own use.",
        f"workload: {{prompt_tokens: {prompt}, new_tokens: {_SPARE_TOKENS}, batch: 1}}",
        *_data(folder, text, calibration_text),
        *_passes(goal, unbounded, causal, prompt, calibrated=calibration_text is not None),
        *_gates(goal, evaluated=text is not None, rewritten=bool(causal)),
    ]
    return "\n".join(parts) + "\n"


def _prompt_tokens(inspected: Mapping[str, Any]) -> int:
    longest = inspected.get("max_positions")
    if not isinstance(longest, int) or longest <= 0:
        return _MOST_PROMPT_TOKENS
    return max(1, min(_MOST_PROMPT_TOKENS, longest - _SPARE_TOKENS))


def _describe(inspected: Mapping[str, Any]) -> str:
    regions = inspected["regions"]
    masks = ", ".join(
        f"{sum(region['mask'] == mask for region in regions)} {mask}"
        for mask in dict.fromkeys(region["mask"] for region in regions)
    )
    size = f"{inspected['parameters']:,} parameters"
    return f"{size}, {len(regions)} attention regions ({masks or 'none'})."


def _data(folder: Path, text: Path | None, calibration_text: Path | None) -> list[str]:
    lines = [
        "# Texts: .txt, .txt.gz or .txt.xz, relative to this file. Calibrate and evaluate on different ones."
    ]
    rows = (("calibration", calibration_text, _TEXT_TOKENS // 4), ("evaluation", text, _TEXT_TOKENS))
    given = [row for row in rows if row[1] is not None]
    lines.append("data:" if given else "# data:")
    for role, path, tokens in rows:
        mark = "" if path is not None else "# "
        shown = _quoted(_relative(os.fspath(path), folder)) if path is not None else f"{role}.txt"
        lines.append(f"{mark}  {role}: {{text: {shown}, tokens: {tokens}}}")
    return lines


def _passes(
    goal: str,
    unbounded: Sequence[Mapping[str, Any]],
    causal: Sequence[Mapping[str, Any]],
    prompt: int,
    *,
    calibrated: bool,
) -> list[str]:
    if not causal:
        return [
            "# No region of this model is causal: there is no cache to shrink, the plan only compiles it.",
            "passes: []",
        ]
    keep = max(64, prompt // 4)
    layers = _layers(unbounded, causal)
    lines = ["passes:"]
    if goal == "memory" and unbounded:
        lines += [
            "  # After the prompt, each key/value head keeps the tokens that the last queries look at.",
            f"  - kv.evict: {{preset: snapkv, keep_tokens: {keep}{layers}}}",
        ]
    if goal == "speed" and unbounded:
        lines += [
            "  # The middle third of the layers sees everything, the rest a window and the first tokens.",
            "  # Models not trained so lose quality: watch perplexity, and widen window_tokens if it rises.",
            "  - attention.static: {preset: longgen}",
        ]
    quantize = "  - kv.quantize: {bits: 8}"
    lines.append("  # Keys and values in 8 bits, with scales measured on the calibration text.")
    # without a text the line would end in an error, so it waits in a comment
    lines.append(quantize if calibrated else f"  # - {quantize.strip(' -')}  # needs data.calibration")
    if len(lines) == 3 and not calibrated:
        lines[0] = "passes: []"
    return lines


def _layers(unbounded: Sequence[Mapping[str, Any]], causal: Sequence[Mapping[str, Any]]) -> str:
    if len(unbounded) == len(causal):
        return ""
    return f", layers: {json.dumps([region['layer'] for region in unbounded])}"


def _gates(goal: str, *, evaluated: bool, rewritten: bool) -> list[str]:
    if not rewritten:
        return []
    increase = {"memory": "10%", "speed": "25%", "quality": "1%"}[goal]
    gates = [f"  perplexity: {{max_increase: {increase}}}"]
    if goal == "speed":
        gates.append("  decode_speedup: {min: 1.1}")
    lines = ["# If one of these does not hold, the command ends with exit code 5 and leaves no artifact."]
    if not evaluated:
        return [*lines, "# gates:  # perplexity needs data.evaluation", *(f"# {gate}" for gate in gates)]
    return [*lines, "gates:", *gates]


def _relative(path: str, folder: Path) -> str:
    """A path that exists, relative to the folder of the plan; anything else as it is."""
    return os.path.relpath(path, folder) if Path(path).exists() else path


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
