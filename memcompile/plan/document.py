"""Plan files as plain data in which every value still knows its line; imported fragments are merged here."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from memcompile.errors import MemcompileError

Path_ = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """A plan before validation: plain data, and the place (`plan.yaml:9`) of every path in it."""

    data: dict[str, Any]
    places: dict[Path_, str] = field(default_factory=dict)
    name: str = "plan"

    def place(self, path: Path_) -> str:
        """The line of `path`, or of the nearest thing around it."""
        for end in range(len(path), 0, -1):
            if (place := self.places.get(path[:end])) is not None:
                return place
        return self.name


def from_mapping(data: Mapping[str, Any]) -> Document:
    """A plan that was written in Python; places are its own paths."""
    if "imports" in data:
        raise MemcompileError(
            "MC114",
            "imports: only a plan that is a file can import",
            where="plan",
            fix="merge the fragments in Python",
        )
    return Document(plain(data))


def read(path: str | os.PathLike[str]) -> Document:
    """Read a plan file and everything it imports.

    Raises:
        MemcompileError: MC101, MC103, MC110 or MC114, with the line.
    """
    document = Document({}, name=os.fspath(path))
    _merge_file(document, Path(path), os.fspath(path), base=Path(path).parent, chain=(), seen=set())
    return document


def parse(text: str, name: str) -> Any:
    """Parse YAML and keep the line numbers.

    Raises:
        MemcompileError: MC101, with the line.
    """
    yaml = YAML(typ="rt", pure=True)
    try:
        return yaml.load(io.StringIO(text))
    except DuplicateKeyError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise MemcompileError(
            "MC101", str(error.problem).splitlines()[0], where=name + line, fix="remove one of the two"
        ) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise MemcompileError(
            "MC101",
            problem,
            where=f"{name}:{mark.line + 1}" if mark else name,
            fix="check indentation, colons and braces",
        ) from error
    except YAMLError as error:
        raise MemcompileError("MC101", str(error), where=name, fix="save the plan as UTF-8 YAML") from error


def _merge_file(
    document: Document, path: Path, name: str, *, base: Path, chain: tuple[Path, ...], seen: set[Path]
) -> None:
    top = _load(path, name, imported=bool(chain))
    real = path.resolve()
    seen.add(real)
    for index, (target, place) in enumerate(_imports(top, name)):
        fragment = path.parent / target
        if fragment.resolve() in (*chain, real):
            raise MemcompileError(
                "MC114",
                f"imports[{index}]: {target} imports itself, through {name}",
                where=place,
                fix="remove one import",
            )
        # a fragment that two others share counts once: its passes must not appear twice
        if fragment.resolve() not in seen:
            if not fragment.is_file():
                raise MemcompileError(
                    "MC114",
                    f"imports[{index}]: {target} does not exist",
                    where=place,
                    fix=_neighbours(fragment),
                )
            shown = os.path.join(os.path.dirname(name), target)
            _merge_file(document, fragment, shown, base=base, chain=(*chain, real), seen=seen)
    _rebase_texts(top, os.path.relpath(path.parent, base))
    _merge(document, top, (), name)


def _load(path: Path, name: str, *, imported: bool) -> CommentedMap:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MemcompileError(
            "MC110", f"there is no plan {name}", where=name, fix=_neighbours(path)
        ) from error
    except UnicodeDecodeError as error:
        raise MemcompileError(
            "MC101", f"not UTF-8 text: {error}", where=name, fix="save the plan as UTF-8 YAML"
        ) from error
    except OSError as error:
        raise MemcompileError(
            "MC114" if imported else "MC110",
            f"{name} cannot be read: {error.strerror}",
            where=name,
            fix="give a YAML file",
        ) from error
    top = parse(text, name)
    if top is None:
        return CommentedMap()
    if not isinstance(top, CommentedMap):
        raise MemcompileError(
            "MC103",
            f"a plan is a mapping of keys, not a {_kind(top)}",
            where=f"{name}:1",
            fix="begin with `version: 1`",
        )
    return top


def _imports(top: CommentedMap, name: str) -> list[tuple[str, str]]:
    """The imported files and their places; takes the key out of `top`."""
    if "imports" not in top:
        return []
    line = _line(top, "imports")
    listed = top.pop("imports")
    if not isinstance(listed, CommentedSeq) or not all(isinstance(item, str) for item in listed):
        raise MemcompileError(
            "MC103",
            "imports: a list of files is wanted",
            where=f"{name}:{line}",
            fix="write `imports: [shared.yaml]`",
        )
    found = []
    for index, target in enumerate(listed):
        place = f"{name}:{listed.lc.item(index)[0] + 1}"
        if os.path.isabs(target):
            raise MemcompileError(
                "MC114",
                f"imports[{index}]: {target} is an absolute path",
                where=place,
                fix="name the file relative to the plan that imports it",
            )
        found.append((str(target), place))
    return found


def _merge(document: Document, top: CommentedMap, path: Path_, name: str) -> None:
    """Lay a file over what was merged before: mappings merge, passes are appended, the rest is replaced."""
    into = document.data
    for part in path:
        into = into[str(part)]
    for key, value in top.items():
        # not every key of YAML is a string: the schema refuses `8: int8` by name
        here = (*path, str(key))
        document.places[here] = f"{name}:{_line(top, key)}"
        if here == ("passes",) and isinstance(value, CommentedSeq):
            before = into.setdefault("passes", [])
            for index, item in enumerate(value):
                _mark(document, item, ("passes", len(before)), name, value.lc.item(index)[0] + 1)
                before.append(plain(item))
        elif isinstance(value, CommentedMap) and isinstance(into.get(str(key)), dict):
            _merge(document, value, here, name)
        else:
            into[str(key)] = plain(value)
            _mark(document, value, here, name, _line(top, key))


def _mark(document: Document, value: Any, path: Path_, name: str, line: int) -> None:
    document.places[path] = f"{name}:{line}"
    if isinstance(value, CommentedMap):
        for key, inner in value.items():
            _mark(document, inner, (*path, str(key)), name, _line(value, key))
    elif isinstance(value, CommentedSeq):
        for index, inner in enumerate(value):
            _mark(document, inner, (*path, index), name, value.lc.item(index)[0] + 1)


def _line(mapping: CommentedMap, key: object) -> int:
    try:
        return int(mapping.lc.key(key)[0]) + 1
    except KeyError:  # the key came through a merge, `<<: *shared`
        return int(mapping.lc.line) + 1


def plain(value: Any) -> Any:
    """Without ruamel's types, which remember their spelling and would find their way into manifests."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, ScalarBoolean):  # an anchored `&on true` is a subclass of int
        return bool(value)
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)


def _rebase_texts(top: CommentedMap, folder: str) -> None:
    """Texts of a fragment are relative to the fragment; say them relative to the plan."""
    data = top.get("data")
    for section in data.values() if isinstance(data, dict) and folder != "." else ():
        if isinstance(section, dict) and isinstance(section.get("text"), str):
            section["text"] = os.path.normpath(os.path.join(folder, section["text"]))


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = sorted(file.name for file in path.parent.glob("*.y*ml"))
    return f"the folder has {', '.join(names[:5])}" if names else "write one with `memcompile plan init`"


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else type(value).__name__
