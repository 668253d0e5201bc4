"""Validate a part of a plan, and say what is wrong with it as the person who wrote it would."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from memcompile.errors import MemcompileError
from memcompile.plan.document import Document, Path_
from memcompile.plan.names import nearest
from memcompile.plan.overrides import MARK
from memcompile.plan.units import UNIT

ModelT = TypeVar("ModelT", bound=BaseModel)

WANTED: Final[dict[str, str]] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "none_required": "nothing",
}
BOUNDS: Final[dict[str, tuple[str, str]]] = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def validate(
    kind: type[ModelT], data: Any, path: Path_, document: Document, *, contradiction: str = "MC104"
) -> ModelT:
    """Validate `data`, found at `path` of the document, as `kind`.

    `contradiction` is the code of an error that concerns several keys at once.

    Raises:
        MemcompileError: MC102, MC103, MC104, MC107, or the code of `contradiction`.
    """
    try:
        # as JSON a list can be a tuple and a name an enum member; strict, "3" is no number and true is no 1
        return kind.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        # an unknown key comes first: it is usually why another one is missing
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise problem(kind, details[0], data, path, document, contradiction) from error
    except MemcompileError as error:
        raise MemcompileError(
            error.code, f"{name_of(path)}: {error.message}", where=document.place(path), fix=error.fix
        ) from error


def problem(
    kind: type[BaseModel],
    detail: ErrorDetails,
    data: Any,
    path: Path_,
    document: Document,
    contradiction: str,
) -> MemcompileError:
    """The error of one pydantic finding."""
    type_ = detail["type"]
    inside = detail["loc"] if type_ in ("extra_forbidden", "missing") else _existing(data, detail["loc"])
    at = (*path, *inside)
    place, name, value = document.place(at), name_of(at), detail.get("input")
    context: Mapping[str, Any] = detail.get("ctx") or {}
    if type_ == "extra_forbidden":
        return unknown_key(name, str(inside[-1]), _keys(kind, inside[:-1]), place)
    if type_ == "missing":
        return MemcompileError(
            "MC107",
            f"{name}: the key is missing",
            where=place,
            fix=f"add {inside[-1]}: {_meaning(kind, inside)}",
        )
    if type_ in BOUNDS:
        key, words = BOUNDS[type_]
        bound = f"{words} {context[key]}"
        return MemcompileError("MC104", f"{name}: {value} is out of range", where=place, fix=f"give {bound}")
    if type_ in ("literal_error", "enum"):
        return _not_a_choice(name, value, str(context["expected"]), place)
    if type_ == UNIT:
        return MemcompileError(
            "MC103", f"{name}: {detail['msg']}", where=place, fix=f"write {context['examples']}"
        )
    if type_ in WANTED:
        return MemcompileError(
            "MC103",
            f"{name}: {WANTED[type_]} is wanted, got {_shown(value)}",
            where=place,
            fix=_meaning(kind, inside),
        )
    reason = str(context.get("error") or detail["msg"])
    code = contradiction if isinstance(value, dict) else "MC104"
    return MemcompileError(code, f"{name}: {reason}", where=place, fix=_meaning(kind, inside))


def unknown_key(
    name: str, key: str, known: Iterable[str], place: str, code: str = "MC102"
) -> MemcompileError:
    """The error of a key nobody declared, with the nearest declared one."""
    # a wrong name on the command line is a wrong --set, whatever it would be in the file
    code = "MC108" if place.startswith(MARK) else code
    return MemcompileError(code, f"{name}: unknown key", where=place, fix=nearest(key, known))


def name_of(path: Path_) -> str:
    """The dotted name of a path; a pass goes by its own name: `kv.evict.keep_tokens`."""
    if path[:1] == ("passes",) and len(path) > 2:
        path = path[2:]
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _not_a_choice(name: str, value: object, expected: str, place: str) -> MemcompileError:
    choices = [choice.strip().strip("'") for choice in expected.replace(" or ", ", ").split(",")]
    code = "MC112" if name in ("target.backend", "target.device") else "MC104"
    return MemcompileError(
        code,
        f"{name}: {value} is not one of {', '.join(choices)}",
        where=place,
        fix=nearest(str(value), choices),
    )


def _existing(data: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of a location that is in the data: pydantic also names the members of a union there."""
    for depth, part in enumerate(loc):
        if isinstance(data, Mapping) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return loc[:depth]
    return loc


def _model_at(kind: type[BaseModel], inside: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section that holds the key at the end of `inside`, if sections lead there."""
    for part in inside:
        field = kind.model_fields.get(str(part))
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        found = [inner for inner in kinds if isinstance(inner, type) and issubclass(inner, BaseModel)]
        if not found:
            return None
        kind = found[0]
    return kind


def _keys(kind: type[BaseModel], inside: tuple[int | str, ...]) -> list[str]:
    section = _model_at(kind, inside)
    return list(section.model_fields) if section else []


def _meaning(kind: type[BaseModel], inside: tuple[int | str, ...]) -> str:
    within = _model_at(kind, inside)
    if within is not None:
        return f"its keys are {', '.join(within.model_fields)}"
    section = _model_at(kind, inside[:-1])
    field = section.model_fields.get(str(inside[-1])) if section else None
    if field is not None and field.description:
        return f"{inside[-1]} is {field.description}"
    return "docs/plan.md lists the keys and their types"


def _shown(value: object) -> str:
    return (
        "nothing" if value is None else f"a list of {len(value)}" if isinstance(value, list) else repr(value)
    )
