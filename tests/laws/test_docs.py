"""The law of documents: links lead somewhere, commands exist, generated pages say what the code says."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from tests.conftest import ROOT

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documents() -> list[str]:
    """Every Markdown file of the project, by its path."""
    folders = (ROOT / name for name in ("docs", "examples", "benchmarks"))
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str) -> None:
    broken = []
    for link in LINK.findall(prose(document)):
        target, _, anchor = link.partition("#")
        if target.startswith(("https:", "http:", "mailto:")):
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("document", documents())
def test_make_targets_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)(?=[`\s])", commands(document))) - targets == set()


@pytest.mark.parametrize("document", documents())
def test_memcompile_commands_and_their_options_exist(document: str) -> None:
    from memcompile.cli.main import app

    for words in re.findall(r"^(?:\.venv/bin/)?memcompile ([^#|>\n]*)", commands(document), re.MULTILINE):
        command: click.Command = app
        for word in words.split():
            inner = (
                command.get_command(click.Context(command), word)
                if isinstance(command, click.Group)
                else None
            )
            command = inner or command
        known = {option for parameter in command.params for option in parameter.opts} | {
            "--help",
            "--version",
        }
        assert command is not app or words.startswith("-"), f"{document}: memcompile {words}"
        assert set(re.findall(r"(?<=\s)--[a-z-]+", f" {words}")) <= known, f"{document}: memcompile {words}"


@pytest.mark.parametrize("document", documents())
def test_python_examples_are_python_and_name_what_there_is(document: str) -> None:
    import memcompile

    for language, text in fences(document):
        if language == "python":
            tree = ast.parse(text)
            names = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "memcompile"
            }
            assert {name for name in names if not hasattr(memcompile, name)} == set()


def test_plans_in_the_documents_are_plans(tmp_path: Path) -> None:
    from memcompile.plan import load_plan

    for name in ("persuasion.txt.xz", "emma.txt.xz"):
        (tmp_path / name).symlink_to(ROOT / "examples" / "texts" / name)
    plans = [text for document in documents() for language, text in fences(document) if language == "yaml"]
    whole = [text for text in plans if text.startswith("version:")]
    assert whole
    for index, text in enumerate(whole):
        path = tmp_path / f"plan{index}.yaml"
        path.write_text(text, encoding="utf-8")
        load_plan(path)


@pytest.mark.parametrize("plan", sorted(path.name for path in (ROOT / "examples" / "plans").glob("*.yaml")))
def test_the_shipped_plans_load(plan: str) -> None:
    from memcompile.plan import load_plan

    load_plan(ROOT / "examples" / "plans" / plan)


def test_generated_pages_are_current() -> None:
    assert generate().stale() == [], "run `make docs`"


def test_the_generator_writes_removes_and_then_finds_nothing_to_do(tmp_path: Path) -> None:
    generator = generate()
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "gone.md").write_text(
        generator.NOTE + "A pass that was removed.\n", encoding="utf-8"
    )
    (tmp_path / "written-by-hand.md").write_text("# Mine\n", encoding="utf-8")
    assert set(generator.write(tmp_path)) == {*generator.pages(), "passes/gone.md"}
    assert not (tmp_path / "passes" / "gone.md").exists()
    assert (tmp_path / "written-by-hand.md").exists()
    assert generator.write(tmp_path) == []


def test_every_page_is_reached_from_the_index() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md", ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in LINK.findall(prose(page.relative_to(ROOT).as_posix())):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.is_dir():
                waiting += target.glob("*.md")
            elif target.suffix == ".md" and target.exists():
                waiting.append(target)
    assert [path for path in sorted((ROOT / "docs").rglob("*.md")) if path not in seen] == []


def generate() -> ModuleType:
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fences(document: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a document: language and text."""
    yield from FENCE.findall((ROOT / document).read_text(encoding="utf-8"))


def commands(document: str) -> str:
    """Everything in a document that a reader would type: bash blocks and code spans, one a line."""
    blocks = [text for language, text in fences(document) if language in ("bash", "")]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose(document))]) + "\n"


def prose(document: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
