"""The key tables of docs/plan.md, written from the models that validate plans."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from memcompile.plan.entries import Common
from memcompile.plan.schema import Data, Gates, Model, Section, Target, Text, Workload
from memcompile.plan.units import parse_bytes

_BOUNDS: Final = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
_NAMES: Final[dict[Any, str]] = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_SECTIONS: Final[tuple[tuple[str, type[Section]], ...]] = (
    ("model", Model),
    ("target", Target),
    ("workload", Workload),
    ("data", Data),
    ("data.calibration, data.evaluation", Text),
)


def plan_reference_markdown() -> str:
    """Every key of a plan, as Markdown tables; the options of a pass stand on the pass's own page."""
    parts = [_heading(name, section) + _table(_rows(section)) for name, section in _SECTIONS]
    parts.append(
        "### `passes`\n\nEvery pass takes these keys beside its own options.\n\n" + _table(_rows(Common))
    )
    parts.append(_heading("gates", Gates) + _table(_gate_rows()))
    return "\n\n".join(parts) + "\n"


def options_markdown(config: type[BaseModel]) -> str:
    """The options of one pass as a Markdown table."""
    return _table(_rows(config)) + "\n"


def _heading(name: str, section: type[BaseModel]) -> str:
    titles = ", ".join(f"`{part.strip()}`" for part in name.split(","))
    return f"### {titles}\n\n{(section.__doc__ or '').strip()}\n\n"


def _rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        yield f"`{prefix}{name}`", _kind(field), _default(field), field.description or ""


def _gate_rows() -> Iterator[tuple[str, str, str, str]]:
    for name, field in Gates.model_fields.items():
        section = next(kind for kind in typing.get_args(field.annotation) if kind is not type(None))
        yield from _rows(section, f"{name}.")


def _table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    head = ("key", "type", "default", "meaning")
    lines = [head, ("---",) * 4, *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    # a default that a machine decides is described, not printed
    return "" if field.default_factory is not None or field.default is None else f"`{field.default}`"


def _kind(field: FieldInfo) -> str:
    return _type(field.annotation, tuple(field.metadata))


def _type(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys"
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extra = typing.get_args(annotation)
        return _type(inner, (*metadata, *extra))
    for mark in metadata:
        if isinstance(mark, BeforeValidator):
            kind = "size" if mark.func is parse_bytes else "share"
            return f"{kind} {_range(metadata)}".strip()
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return " or ".join(_type(member, metadata) for member in members)
    if typing.get_origin(annotation) in (list, tuple):
        return f"list of {_type(typing.get_args(annotation)[0])}"
    return f"{_NAMES.get(annotation, 'selector')} {_range(metadata)}".strip()


def _range(metadata: tuple[Any, ...]) -> str:
    found: dict[str, str] = {}
    for mark in metadata:
        # `Field(ge=1)` inside Annotated keeps its bounds in metadata of its own
        for inner in (mark, *getattr(mark, "metadata", ())):
            found |= {
                key: f"{sign} {inner_value}"
                for key, sign in _BOUNDS
                if (inner_value := getattr(inner, key, None)) is not None
            }
    return ", ".join(found[key] for key, _ in _BOUNDS if key in found)
