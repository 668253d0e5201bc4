"""The lines under `passes:`: presets expanded, options validated by the pass's own Config."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Protocol

from pydantic import BaseModel, Field

from memcompile.errors import MemcompileError
from memcompile.plan.document import Document, Path_
from memcompile.plan.names import nearest
from memcompile.plan.problems import unknown_key, validate
from memcompile.plan.schema import Section
from memcompile.rewrite import entry
from memcompile.rewrite.selectors import parse_heads, parse_layers


class Preset(Protocol):
    """Named values of a pass's options, and the paper they come from."""

    @property
    def values(self) -> Mapping[str, Any]: ...
    @property
    def paper(self) -> str: ...


class PassKind(Protocol):
    """What a plan needs to know of a pass; `memcompile.rewrite.Pass` is one."""

    @property
    def Config(self) -> type[BaseModel]: ...
    @property
    def presets(self) -> Mapping[str, Preset]: ...


class Library(Protocol):
    """Where passes are looked up by name."""

    def names(self) -> Collection[str]:
        """All names, without loading any pass."""

    def load(self, name: str) -> PassKind:
        """The pass of a known name."""


class Common(Section):
    """Keys that every pass takes; they are handled before the pass sees its options."""

    preset: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="a published method: values of this pass's options, which options given here replace",
    )
    layers: Any = Field(
        None,
        description='layers it applies to: `3`, `"2-29"`, `"0, 4-7"`, `"33%-67%"`, `{every: 4, from: 2}`, '
        '`"model.layers.*"`, `"re:…"`, `"!0"`, or a list of these; all if not given',
    )
    heads: Any = Field(
        None,
        description='key/value heads it applies to: `0`, `[0, 2]`, `{query: "0-2"}`, '
        "or a mapping from layers to heads; all if not given",
    )
    expect: Annotated[int, Field(ge=1)] | None = Field(
        None, description="regions it must rewrite; fewer end the command with exit code 4"
    )


COMMON: Final = tuple(Common.model_fields)


@dataclass(frozen=True, slots=True)
class PassEntry(entry.PassEntry):
    """One pass of a plan, resolved: `config` is the pass's own, with its preset expanded.

    `common` holds preset, layers, heads and expect as they were written.
    """

    common: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> BaseModel:
        """The options of the pass: its config."""
        return self.config

    @property
    def preset(self) -> str | None:
        """The preset that was asked for."""
        return self.common.get("preset")

    def resolved(self) -> dict[str, Any]:
        """The entry as a plan would spell it out in full."""
        return {self.name: dict(self.common) | self.config.model_dump(mode="json")}


def resolve_entries(document: Document, library: Library) -> tuple[PassEntry, ...]:
    """Resolve every pass of the plan, in the order of the plan.

    Raises:
        MemcompileError: MC102 to MC109, with the line.
    """
    listed = document.data.get("passes")
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise MemcompileError(
            "MC103",
            "passes: a list is wanted",
            where=document.place(("passes",)),
            fix="write `- kv.quantize: {bits: 8}`, one line for each pass",
        )
    return tuple(_resolve(raw, ("passes", index), document, library) for index, raw in enumerate(listed))


def _resolve(raw: Any, path: Path_, document: Document, library: Library) -> PassEntry:
    if not isinstance(raw, dict) or len(raw) != 1:
        raise MemcompileError(
            "MC103",
            f"passes[{path[1]}]: one pass name with its options is wanted",
            where=document.place(path),
            fix=f"write `- {raw}: {{}}`"
            if isinstance(raw, str)
            else "begin a new `- ` for each pass; indent its options",
        )
    ((name, options),) = raw.items()
    path = (*path, name)
    where = document.place(path)
    if name not in library.names():
        raise MemcompileError("MC105", f"unknown pass {name}", where=where, fix=_which_pass(name, library))
    kind = library.load(name)
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise MemcompileError(
            "MC103",
            f"{name}: a mapping of options is wanted, got {options!r}",
            where=where,
            fix=f"write {name}: {{}}",
        )
    # unknown keys first, with both kinds of known ones to choose from
    known = (*COMMON, *kind.Config.model_fields)
    for key in options:
        if key not in known:
            at = (*path, key)
            raise unknown_key(f"{name}.{key}", key, known, document.place(at))
    merged = _with_preset(options, kind, path, document)
    given = {key: value for key, value in merged.items() if key in COMMON}
    own = {key: value for key, value in merged.items() if key not in COMMON}
    common = validate(Common, given, path, document)
    if common.heads is not None and not getattr(kind, "takes_heads", True):
        raise MemcompileError(
            "MC102",
            f"{name}.heads: {name} works on whole layers",
            where=document.place((*path, "heads")),
            fix="remove heads, or choose layers",
        )
    layers, heads = (
        _selector(getattr(common, key), parse, (*path, key), document)
        for key, parse in (("layers", parse_layers), ("heads", parse_heads))
    )
    for group in one_of(kind.Config):
        if all(own.get(key) is None for key in group):
            raise MemcompileError(
                "MC107",
                f"{name}: one of {' and '.join(group)} is needed",
                where=where,
                fix=f"add {group[0]}, or a preset that brings one",
            )
    config = validate(kind.Config, own, path, document)
    written = common.model_dump(mode="json", exclude_none=True)
    return PassEntry(name, config, layers, heads, common.expect, where, written)


def one_of(config: type[BaseModel]) -> tuple[tuple[str, ...], ...]:
    """Groups of options of which exactly one is given: the class variable `one_of` of a Config."""
    groups: tuple[tuple[str, ...], ...] = getattr(config, "one_of", ())
    return groups


def _with_preset(options: dict[str, Any], kind: PassKind, path: Path_, document: Document) -> dict[str, Any]:
    name = path[-1]
    groups = one_of(kind.Config)
    for group in groups:
        both = [key for key in group if options.get(key) is not None]
        if len(both) > 1:
            raise MemcompileError(
                "MC109",
                f"{name}: {' and '.join(f'{key} ({options[key]})' for key in both)} contradict each other",
                where=document.place((*path, both[1])),
                fix=f"keep one of {', '.join(both)}",
            )
    preset = options.get("preset")
    if preset is None:
        return options
    if not isinstance(preset, str) or preset not in kind.presets:
        raise MemcompileError(
            "MC106",
            f"{name}: unknown preset {preset}",
            where=document.place((*path, "preset")),
            fix=nearest(str(preset), kind.presets) if kind.presets else f"{name} has no presets",
        )
    values = dict(kind.presets[preset].values)
    for group in groups:
        if any(options.get(key) is not None for key in group):
            # the user's keep_tokens replaces the preset's keep_fraction, it does not contradict it
            values = {key: value for key, value in values.items() if key not in group}
    return values | options


def _selector(selector: Any, parse: Callable[..., Any], path: Path_, document: Document) -> Any:
    if selector is None:
        return None
    where = document.place(path)
    try:
        return parse(selector, where=where)
    except MemcompileError as error:
        raise MemcompileError(
            error.code, f"{path[-2]}.{error.message}", where=where, fix=error.fix
        ) from error


def _which_pass(name: str, library: Library) -> str:
    # people write the method's name where the mechanism's belongs
    owners = [owner for owner in library.names() if name in library.load(owner).presets]
    if owners:
        return f"{name} is a preset: write {owners[0]}: {{preset: {name}}}"
    return nearest(name, library.names())
