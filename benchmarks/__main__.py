"""Run every benchmark, each in a process of its own: `python -m benchmarks [--json] [NAME ...]`.

A benchmark is a module of this folder that runs by `python -m benchmarks.NAME`, prints a table, or with
`--json` one JSON object, and ends with 0 when what it must reach is reached.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parent


def names() -> list[str]:
    """The benchmarks of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def run(name: str, *, as_json: bool) -> tuple[int, Any]:
    """Run one benchmark from the top of the repository; return its exit code and, if asked for, its JSON."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--json"] if as_json else [])]
    done = subprocess.run(
        command, cwd=FOLDER.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if as_json else None,
        text=True, check=False,
    )  # fmt: skip
    if not as_json:
        return done.returncode, None
    try:
        return done.returncode, json.loads(done.stdout)
    except ValueError:
        return done.returncode or 1, None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks and print their tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names())}; all if none")
    parser.add_argument("--json", action="store_true", help="print one JSON object of all results")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(names())}")
    codes, results = {}, {}
    for name in options.names or names():
        if not options.json:
            print(f"== {name}", flush=True)
        codes[name], results[name] = run(name, as_json=options.json)
    if options.json:
        print(json.dumps({"schema": 1, "exit_codes": codes, "results": results}))
    else:
        for name, code in codes.items():
            print(f"{name}: {'reached' if code == 0 else f'NOT REACHED (exit code {code})'}")
    return max(codes.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
