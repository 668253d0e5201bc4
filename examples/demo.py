"""The demo: rewrite SmolLM2-135M for long prompts, compare it with the original, and ask it about a book.

    python examples/demo.py           # prompts of 4,000 tokens
    python examples/demo.py --short   # 1,024 tokens and a quick evaluation, for CI

Everything it does is a memcompile command, and each is printed before it runs.
"""

from __future__ import annotations

import argparse
import lzma
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
PLAN: Final = Path("examples/plans/demo.yaml")
BOOK: Final = Path("examples/texts/persuasion.txt.xz")
# of this book with SmolLM2's tokenizer, rounded down so that the prompt stays below the plan's
CHARACTERS_PER_TOKEN: Final = 3.9
QUESTION: Final = "\n\nWho is Sir Walter Elliot, and what is he proud of? Answer in two or three sentences."
SHORT_TOKENS: Final = 1024
SHORT: Final = (
    "--quick",
    "--set",
    f"workload.prompt_tokens={SHORT_TOKENS}",
    "--set",
    "passes.kv.evict.keep_tokens=256",
)


def passage(tokens: int) -> str:
    """The beginning of the book, about `tokens` long, cut at the end of a paragraph."""
    with lzma.open(ROOT / BOOK, "rt", encoding="utf-8") as file:
        text = file.read(int(tokens * CHARACTERS_PER_TOKEN))
    return text[: text.rindex("\n\n")]


def run(*words: str | Path) -> None:
    """Print a memcompile command and run it; a failing one ends the demo with its exit code."""
    arguments = [str(word) for word in words]
    print(f"\n$ memcompile {shlex.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "memcompile", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        sys.exit(done.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rewrite SmolLM2-135M for long prompts and compare.")
    parser.add_argument("--short", action="store_true", help="1,024 tokens and a quick evaluation")
    short = parser.parse_args().short
    out = Path("out/demo-short" if short else "out/demo")
    began = time.monotonic()

    run("inspect", MODEL)
    run("optimize", MODEL, "--plan", PLAN, "-o", out, "--force", *(SHORT if short else ()))

    prompt = out.with_name(f"{out.name}-prompt.txt")
    (ROOT / prompt).write_text(passage(SHORT_TOKENS if short else 4000) + QUESTION, encoding="utf-8")
    run("run", out, "--prompt-file", prompt, "--chat", "--max-new-tokens", "48" if short else "96")

    print(f"\nThe artifact is in {out}/, its report in {out}/report.html and {out}/report.json.")
    print(f"The prompt was {prompt}. The demo took {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
