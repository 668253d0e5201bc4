"""The main job at full length: SmolLM2-135M, 8,000 prompt tokens, snapkv keeping 1,024 of them in int8.

    python -m benchmarks.main_job [--json] [--model FILE] [--prompt-tokens N] [--quick]

Original and rewritten model run in processes of their own, one after the other, on the same backend.
Printed are the comparison and what the main job must reach: state at most 1/20 of the dense float32 cache,
decoding faster than dense, the perplexity increase, and capture + rewrite + lowering under a minute
(calibration set aside).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PLAN: Final = ROOT / "examples" / "plans" / "snapkv-int8.yaml"
STATE_SHARE: Final = 1 / 20
COMPILE_SECONDS: Final = 60.0
# what compiling spends beside capture, rewrite and lowering
UNCOUNTED_STAGES: Final = ("calibrate", "evaluate", "lower the original", "write the report")


@dataclass
class StageClock:
    """A progress that keeps the seconds of every stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    _name: str = ""
    _begun: float = 0.0

    def stage(self, name: str) -> None:
        self.stop()
        self._name, self._begun = name, time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)

    def update(self, done: int, total: int) -> None:
        del done, total

    def stop(self) -> None:
        """End the stage that is running."""
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._begun
        self._name = ""

    def compile_seconds(self) -> float:
        """Seconds of capture, rewrite and lowering."""
        return sum(spent for name, spent in self.seconds.items() if not name.startswith(UNCOUNTED_STAGES))


def measure(model: Path, prompt_tokens: int, *, quick: bool, out: Path) -> dict[str, Any]:
    """Optimize the model by the shipped plan; return the report and the checks as JSON values."""
    from memcompile import pipeline
    from memcompile.plan import load_plan
    from memcompile.report import read_json

    plan = load_plan(PLAN, (f"workload.prompt_tokens={prompt_tokens}",))
    clock = StageClock()
    pipeline.optimize(
        str(model), plan, out / "artifact", compare_with_source=False, quick=quick, progress=clock
    )
    clock.stop()
    report = read_json(out / "artifact" / "report.json")
    return {
        "schema": 1,
        "benchmark": "main_job",
        "checks": checks(report, clock.compile_seconds()),
        "stage_seconds": {name: round(spent, 2) for name, spent in clock.seconds.items()},
        "report": report,
    }


def checks(report: dict[str, Any], compile_seconds: float) -> list[dict[str, Any]]:
    """Compare the measurements with what the main job must reach."""
    ratios = report["ratios"]["to_original"]
    state, speedup = ratios["state_bytes"], 1 / ratios["decode_seconds_per_token"]
    rows = (
        ("state / dense float32 cache", f"at most {STATE_SHARE:g}", f"{state:.4f}", state <= STATE_SHARE),
        ("decode speedup over dense", "above 1", f"{speedup:.2f}", speedup > 1),
        ("perplexity increase", "reported", f"{ratios['perplexity'] - 1:+.2%}", True),
        (
            "capture + rewrite + lowering, s",
            f"under {COMPILE_SECONDS:.0f}",
            f"{compile_seconds:.1f}",
            compile_seconds < COMPILE_SECONDS,
        ),
    )
    return [dict(zip(("name", "wanted", "got", "passed"), row, strict=True)) for row in rows]


def show(result: dict[str, Any]) -> None:
    """Print the comparison, the checks and where the time went."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from memcompile.report import print_report

    console = Console()
    print_report(result["report"], console)
    table = Table(title="main job", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "wanted", "got", ""):
        table.add_column(column)
    for check in result["checks"]:
        table.add_row(check["name"], check["wanted"], check["got"], "met" if check["passed"] else "NOT MET")
    console.print(table)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["stage_seconds"].items())
    console.print(f"stages: {spent}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The main job on SmolLM2-135M at 8,000 prompt tokens.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    parser.add_argument("--quick", action="store_true", help="one window, three passkey depths")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="memcompile-bench-") as folder:
        result = measure(options.model, options.prompt_tokens, quick=options.quick, out=Path(folder))
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result)
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
