"""The law of errors: one list in the code, the same in the docs, every code raised, every code tested."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from memcompile.errors import ARTIFACT, COVERAGE, ERRORS, GATE, INTERNAL, MODEL, USAGE, MemcompileError

CODE = re.compile(r"MC\d{3}")
EXIT_CODE_OF_RANGE = {"1": USAGE, "2": MODEL, "3": COVERAGE, "4": GATE, "5": ARTIFACT, "9": INTERNAL}
# a measuring process that died missed no gate; a taken output path is no artifact's fault
EXCEPTIONS = {"MC402": INTERNAL, "MC508": USAGE}


def test_the_docs_list_every_code_with_its_title_and_exit_code_and_no_other(repository: Path) -> None:
    page = (repository / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(MC\d{3})` \| (.*) \| (\d) \|$", page, re.MULTILINE)
    assert {code: (title, int(exit_code)) for code, title, exit_code in rows} == {
        code: (kind.title, kind.exit_code) for code, kind in ERRORS.items()
    }
    assert len(rows) == len(ERRORS)


def test_every_code_in_the_source_is_declared(repository: Path) -> None:
    assert codes_in(sources(repository)) - set(ERRORS) == set()


def test_every_code_is_used_in_the_source(repository: Path) -> None:
    assert set(ERRORS) - codes_in(sources(repository)) == set(), "declared, but nothing raises them"


def test_every_code_is_provoked_by_a_test(repository: Path) -> None:
    tests = (path for path in (repository / "tests").rglob("*.py") if path != Path(__file__))
    assert set(ERRORS) - codes_in(tests) == set(), "no test provokes them"


def test_every_error_says_how_to_mend_it(repository: Path) -> None:
    without = [
        f"{path.relative_to(repository)}:{call.lineno}"
        for path in sources(repository)
        for call in calls_of(path, "MemcompileError")
        if "fix" not in {keyword.arg for keyword in call.keywords} and not is_internal(call)
    ]
    assert without == []


@pytest.mark.parametrize("code", ERRORS)
def test_the_exit_code_follows_from_the_range(code: str) -> None:
    assert ERRORS[code].exit_code == EXCEPTIONS.get(code, EXIT_CODE_OF_RANGE[code[2]])


def test_an_error_prints_code_message_place_and_fix() -> None:
    error = MemcompileError(
        "MC102", "kv.evict.keep_token: unknown key", where="plan.yaml:9", fix="keep_tokens?"
    )
    assert str(error) == (
        "MC102 kv.evict.keep_token: unknown key\n  where: plan.yaml:9\n  fix:   keep_tokens?"
    )
    assert error.as_dict() == {
        "code": "MC102",
        "message": "kv.evict.keep_token: unknown key",
        "where": "plan.yaml:9",
        "fix": "keep_tokens?",
        "exit_code": USAGE,
    }


def test_the_package_only_raises_declared_codes() -> None:
    with pytest.raises(KeyError):
        _ = MemcompileError("MC999", "never declared").exit_code


def sources(repository: Path) -> Iterator[Path]:
    """Every source file of the package except the list of codes itself."""
    for folder in ("memcompile", "passes", "backends"):
        for path in sorted((repository / folder).rglob("*.py")):
            if path != repository / "memcompile" / "errors.py":
                yield path


def codes_in(paths: Iterable[Path]) -> set[str]:
    """The error codes that stand as string constants in the files."""
    return {
        code
        for path in paths
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for code in CODE.findall(node.value)
    }


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def calls_of(path: Path, name: str) -> Iterator[ast.Call]:
    """Every call of `name` in the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


def is_internal(call: ast.Call) -> bool:
    """Whether the call's code is MC901: nobody outside can mend that."""
    return bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value == "MC901"
