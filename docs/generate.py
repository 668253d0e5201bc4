"""Write the pages of docs/ that are made from the code, so that they say what the code does.

python docs/generate.py           # write them
python docs/generate.py --check   # change nothing; exit 1 and name the pages that are not current
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parent
NOTE: Final = "<!-- Made from the code by docs/generate.py: change the code, then run `make docs`. -->\n\n"
Pages = dict[str, str]

RANGES: Final[dict[str, str]] = {
    "MC1": "The plan and the command line",
    "MC2": "The model",
    "MC3": "Coverage: what the plan's passes found",
    "MC4": "Gates",
    "MC5": "Artifacts and the runtime",
    "MC9": "memcompile itself",
}
EXIT_CODES: Final[dict[int, str]] = {
    0: "done",
    1: "memcompile broke one of its own rules: please report it with the message",
    2: "the command line or the plan is wrong",
    3: "the model was not found or not understood",
    4: "coverage: a selector matched nothing, `expect` is not met, or every region was refused",
    5: "a gate is not met",
    6: "the artifact is missing, invalid or cannot be run here",
}

ERRORS_INTRODUCTION: Final = """# Errors

Every error a user can meet has a code, says what is wrong, where, and how to mend it. With `--json` the
same four things are printed as fields. The exit code tells the kind.

```
MC102 kv.evict.keep_token: unknown key
  where: plan.yaml:9
  fix:   did you mean keep_tokens?
```

"""

PLAN_INTRODUCTION: Final = """# The plan

A plan is a YAML file, or a mapping with the same keys in Python. It says what is compiled, for which target
and workload, by which passes, and what must hold afterwards. A key that is not listed here is an error.

```yaml
version: 1
target: {backend: onnxruntime, device: cpu, threads: 2}
workload: {prompt_tokens: 4000, new_tokens: 128}
data:
  calibration: {text: persuasion.txt.xz}
  evaluation: {text: emma.txt.xz}
passes:
  - attention.static: {preset: longgen, layers: "!0-1"}
  - kv.quantize: {bits: 8}
gates:
  perplexity: {max_increase: 2%}
```

`imports: [shared.yaml]` takes in other plan files, whose passes come first; what stands in the importing
file wins. On the command line, `--set KEY=VALUE` changes one key: `--set passes.kv.quantize.bits=4`.

"""


def errors_pages() -> Pages:
    """The list of error codes and exit codes."""
    from memcompile.errors import ERRORS

    lines = [
        ERRORS_INTRODUCTION,
        "## Exit codes\n\n| exit code | means |\n|---|---|\n",
        *(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items()),
    ]
    for prefix, heading in RANGES.items():
        codes = {code: kind for code, kind in ERRORS.items() if code.startswith(prefix)}
        lines.append(f"\n## {heading}\n\n| code | means | exit code |\n|---|---|---|\n")
        lines += (f"| `{code}` | {kind.title} | {kind.exit_code} |\n" for code, kind in codes.items())
    return {"errors.md": "".join(lines)}


def commands_pages() -> Pages:
    """Every command and its options."""
    from memcompile.cli.reference import cli_reference_markdown

    introduction = "# Commands\n\nWhat they print and how they end: [the command line](cli.md).\n\n"
    return {"commands.md": introduction + cli_reference_markdown()}


def plan_pages() -> Pages:
    """Every key of a plan."""
    from memcompile.plan.reference import plan_reference_markdown

    return {"plan.md": PLAN_INTRODUCTION + plan_reference_markdown()}


def passes_pages() -> Pages:
    """One page for each pass that memcompile ships."""
    from memcompile.rewrite.cards import pass_page
    from memcompile.rewrite.registry import BUILT_IN

    return {f"passes/{name}.md": pass_page(name) for name in BUILT_IN}


GENERATORS: Final[tuple[Callable[[], Pages], ...]] = (errors_pages, plan_pages, commands_pages, passes_pages)


def pages() -> Pages:
    """All generated pages, by path inside docs/."""
    made: Pages = {}
    for generator in GENERATORS:
        made.update({path: NOTE + text.rstrip() + "\n" for path, text in generator().items()})
    return made


def stale(folder: Path = DOCS) -> list[str]:
    """The generated pages whose file is missing or different, and files left over from pages now gone."""
    made = pages()
    wrong = [path for path, text in made.items() if _text(folder / path) != text]
    left = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.md")
        if _text(path).startswith(NOTE.strip())
    ]
    return sorted({*wrong, *(path for path in left if path not in made)})


def write(folder: Path = DOCS) -> list[str]:
    """Write every page that is not current, remove the ones left over; returns their paths."""
    made = pages()
    changed = stale(folder)
    for path in changed:
        if path in made:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(made[path], encoding="utf-8")
        else:
            (folder / path).unlink()
    return changed


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        changed = stale()
        for path in changed:
            print(f"docs/{path} is not what the code says: run `make docs`")
        return 1 if changed else 0
    if arguments:
        print(__doc__)
        return 2
    for path in write():
        print(f"wrote docs/{path}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    sys.exit(main(sys.argv[1:]))
