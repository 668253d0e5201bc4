"""A plan, read and validated: what the rest of memcompile is given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from memcompile.errors import MemcompileError
from memcompile.plan.contradictions import refuse_contradictions
from memcompile.plan.document import Document, Path_, from_mapping, read
from memcompile.plan.entries import Library, PassEntry, resolve_entries
from memcompile.plan.library import Registry
from memcompile.plan.overrides import SECTIONS, apply
from memcompile.plan.problems import unknown_key, validate
from memcompile.plan.schema import TEXT_SUFFIXES, VERSION, Data, Gates, Model, Section, Target, Text, Workload

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved plan. Paths in it are relative to `base`."""

    version: int
    model: Model
    target: Target
    workload: Workload
    data: Data
    passes: tuple[PassEntry, ...]
    gates: Gates
    name: str = "plan"
    base: Path = field(default=Path())
    _places: Mapping[Path_, str] = field(default_factory=dict, repr=False, compare=False)

    def resolved(self) -> dict[str, Any]:
        """The plan spelled out in full, presets expanded, as JSON can hold it; `load_plan` reads it back."""
        return {
            "version": self.version,
            "model": _dump(self.model),
            "target": _dump(self.target),
            "workload": _dump(self.workload),
            "data": self._data(),
            "passes": [entry.resolved() for entry in self.passes],
            "gates": _dump(self.gates),
        }

    def _data(self) -> dict[str, Any]:
        """The texts with whole paths: an artifact can be evaluated again from any folder."""
        data = _dump(self.data)
        for text in data.values():
            text["text"] = os.path.abspath(self.base / text["text"])
        return data

    def where(self, *path: str | int) -> str:
        """The place of a key, for messages: `plan.where("gates", "perplexity")` is `plan.yaml:14`."""
        return Document({}, dict(self._places), self.name).place(path)

    def text_path(self, text: Text) -> Path:
        """Where a text of the plan is."""
        return self.base / text.text

    def model_source(self) -> str | None:
        """The plan's model source; a path is taken relative to the plan if it exists there."""
        source = self.model.source
        if source is not None and (self.base / source).exists():
            return os.fspath(self.base / source)
        return source


def load_plan(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    base: Path | None = None,
    library: Library | None = None,
) -> Plan:
    """Read a plan from a YAML file or from a mapping, apply `--set` overrides, and validate all of it.

    `base` is the folder that paths in a mapping are relative to; the current one if not given.

    Raises:
        MemcompileError: MC101 to MC121, with the line and a fix.
    """
    document = from_mapping(source) if isinstance(source, Mapping) else read(source)
    if not isinstance(source, Mapping):
        base = Path(source).parent
    apply(document, overrides)
    for key in document.data:
        if key not in SECTIONS:
            raise unknown_key(key, key, (*SECTIONS, "imports"), document.place((key,)))
    version = _version(document)
    model = _section(document, "model", Model)
    target = _section(document, "target", Target)
    workload = _section(document, "workload", Workload)
    data = _section(document, "data", Data)
    gates = _gates(document)
    entries = resolve_entries(document, library or Registry())
    refuse_contradictions(entries)
    plan = Plan(
        version,
        model,
        target,
        workload,
        data,
        entries,
        gates,
        document.name,
        base or Path(),
        dict(document.places),
    )
    _check_texts(plan)
    return plan


def _version(document: Document) -> int:
    version = document.data.get("version", VERSION)
    where = document.place(("version",))
    if not isinstance(version, int) or isinstance(version, bool):
        raise MemcompileError(
            "MC103", f"version: {version!r} is not a number", where=where, fix=f"write version: {VERSION}"
        )
    if version != VERSION:
        fix = "install a newer memcompile" if version > VERSION else f"write version: {VERSION}"
        raise MemcompileError(
            "MC111",
            f"version: the plan has version {version}, this memcompile knows {VERSION}",
            where=where,
            fix=fix,
        )
    return version


def _section(document: Document, key: str, kind: type[SectionT]) -> SectionT:
    data = document.data.get(key)
    return validate(kind, {} if data is None else data, (key,), document)


def _gates(document: Document) -> Gates:
    data = document.data.get("gates")
    for name, limits in data.items() if isinstance(data, dict) else ():
        place = document.place(("gates", name))
        if name not in Gates.model_fields:
            raise unknown_key(f"gates.{name}", name, Gates.model_fields, place, code="MC113")
        if limits is None or limits == {}:
            raise MemcompileError(
                "MC113",
                f"gates.{name}: the gate has no limit",
                where=place,
                fix=f"give {_limit_keys(name)}, or remove it",
            )
    return validate(Gates, {} if data is None else data, ("gates",), document, contradiction="MC113")


def _limit_keys(gate: str) -> str:
    annotation = Gates.model_fields[gate].annotation
    kind = next(kind for kind in getattr(annotation, "__args__", ()) if kind is not type(None))
    return " or ".join(kind.model_fields)


def _check_texts(plan: Plan) -> None:
    for role in Data.model_fields:
        text: Text | None = getattr(plan.data, role)
        if text is None:
            continue
        where, path = plan.where("data", role, "text"), plan.text_path(text)
        if not text.text.endswith(TEXT_SUFFIXES):
            suffixes = ", ".join(TEXT_SUFFIXES)
            raise MemcompileError(
                "MC121",
                f"data.{role}.text: {text.text} is not one of {suffixes}",
                where=where,
                fix="give a plain text",
            )
        if not path.is_file():
            raise MemcompileError(
                "MC121",
                f"data.{role}.text: {path} does not exist",
                where=where,
                fix=f"give a text relative to {plan.base.resolve()}"
                if str(plan.base) != "."
                else "give a text that exists",
            )
    for gate in ("perplexity", "kl"):
        if getattr(plan.gates, gate) is not None and plan.data.evaluation is None:
            raise MemcompileError(
                "MC107",
                f"gates.{gate}: there is no evaluation text to measure it on",
                where=plan.where("gates", gate),
                fix="add data: {evaluation: {text: book.txt}}",
            )


def _dump(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_none=True)
