"""`--set passes.1.keep_tokens=1024`: change a plan from the command line, with values typed as in YAML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from memcompile.errors import MemcompileError
from memcompile.plan.document import Document, Path_, parse, plain
from memcompile.plan.names import nearest
from memcompile.plan.schema import Data, Gates, Model, Section, Target, Workload

SECTIONS: Final[dict[str, type[Section] | None]] = {
    "version": None,
    "model": Model,
    "target": Target,
    "workload": Workload,
    "data": Data,
    "passes": None,
    "gates": Gates,
}
MARK: Final = "--set "


def apply(document: Document, overrides: Iterable[str]) -> None:
    """Apply overrides in order, in place.

    Raises:
        MemcompileError: MC108, an override has no `=`, names no place of this plan, or is not YAML after it.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise _bad(override, f"{override!r} is not KEY=VALUE", "write --set target.threads=1")
        try:
            value = plain(parse(text, MARK + override))
        except MemcompileError as error:
            raise _bad(
                override, f"the value {text!r} is not YAML: {error.message}", "quote it for the shell"
            ) from error
        parts = key.strip().split(".")
        path = (
            _pass_path(document, override, parts) if parts[0] == "passes" else _section_path(override, parts)
        )
        _put(document, override, path, value)


def _section_path(override: str, parts: list[str]) -> Path_:
    if parts[0] not in SECTIONS:
        raise _bad(override, f"a plan has no key {parts[0]}", nearest(parts[0], SECTIONS))
    if parts[0] == "version" and len(parts) > 1:
        raise _bad(
            override, f"{'.'.join(parts)} does not exist: version is a number", "write --set version=1"
        )
    if parts[0] != "version" and len(parts) == 1:
        section = SECTIONS[parts[0]]
        keys = ", ".join(section.model_fields) if section else ""
        raise _bad(override, f"{parts[0]} is a section, not a value", f"name one of its keys: {keys}")
    return tuple(parts)


def _pass_path(document: Document, override: str, parts: list[str]) -> Path_:
    """`passes.<index>.<key>…` or `passes.<name>.<key>…`; names have dots of their own."""
    entries = document.data.get("passes") or []
    names = (
        [next(iter(entry), "") for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    if not names:
        raise _bad(override, "the plan has no passes to change", "add the pass to the plan file")
    shown = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    rest = parts[1:]
    if rest and rest[0].isdigit():
        index, keys = int(rest[0]), rest[1:]
        if index >= len(names):
            raise _bad(override, f"the plan has no pass {index}", f"its passes are: {shown}")
    else:
        whole = ".".join(rest)
        matches = [at for at, name in enumerate(names) if whole == name or whole.startswith(name + ".")]
        if not matches:
            raise _bad(
                override, f"the plan has no pass {whole or '(none named)'}", f"its passes are: {shown}"
            )
        if len(matches) > 1:
            fix = " or ".join(f"passes.{at}" for at in matches)
            raise _bad(
                override, f"{names[matches[0]]} is {len(matches)} times in the plan", f"say which one: {fix}"
            )
        index, keys = matches[0], whole[len(names[matches[0]]) + 1 :].split(".")
    if not keys or not all(keys):
        raise _bad(override, f"no key of {names[index]} is named", f"write --set passes.{index}.KEY=VALUE")
    return ("passes", index, names[index], *keys)


def _put(document: Document, override: str, path: Path_, value: Any) -> None:
    at: Any = document.data
    for depth, part in enumerate(path[:-1]):
        if isinstance(at, list) and not isinstance(part, int):
            if not part.isdigit() or int(part) >= len(at):
                raise _bad(override, f"{_dotted(path[:depth])} has no item {part}", f"it has {len(at)} items")
            part = int(part)
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict | list):
            raise _bad(
                override,
                f"{_dotted(path[: depth + 1])} is the value {at!r}, it has no keys",
                "name the value itself",
            )
    last = path[-1]
    if isinstance(at, list):
        if not isinstance(last, str) or not last.isdigit() or int(last) >= len(at):
            raise _bad(override, f"{_dotted(path[:-1])} has no item {last}", f"it has {len(at)} items")
        last = int(last)
        path = (*path[:-1], last)
    at[last] = value
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = MARK + override


def _dotted(path: Path_) -> str:
    return ".".join(map(str, path))


def _bad(override: str, message: str, fix: str) -> MemcompileError:
    return MemcompileError("MC108", message, where=MARK + override, fix=fix)
