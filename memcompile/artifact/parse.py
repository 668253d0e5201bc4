"""Build frozen dataclasses from JSON values, strictly: unknown keys, missing keys and wrong types are errors.

The runtime runs without pydantic, so the manifest is read by this instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_MAX_DEPTH = 64


def build(cls: type[T], data: object, where: str = "") -> T:
    """Make a `cls` from JSON values.

    Annotations understood: str, int, float, bool, None, Any, unions of them, tuple[X, ...],
    dict[str, X] and dataclasses. Raises ValueError with the dotted place of what is wrong.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the top level'}: an object is needed, got {_name(data)}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{_join(where, key)}: unknown key{hint}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(where, name)}: missing")
    return cls(**values)


def _value(kind: Any, data: object, where: str) -> Any:
    if kind is Any:
        return _free(data, where, 0)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where}: a list is needed, got {_name(data)}")
        item = get_args(kind)[0]
        return tuple(_value(item, each, f"{where}[{index}]") for index, each in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: an object is needed, got {_name(data)}")
        item = get_args(kind)[1]
        return {key: _value(item, each, _join(where, key)) for key, each in data.items()}
    if dataclasses.is_dataclass(kind):
        return build(kind, data, where)  # type: ignore[arg-type]
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    # bool is an int to isinstance, but `true` is not a size
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{where}: {kind.__name__} is needed, got {_name(data)}")
    return data


def _union(kinds: tuple[Any, ...], data: object, where: str) -> Any:
    if data is None:
        if type(None) in kinds:
            return None
        raise ValueError(f"{where}: null is not allowed")
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _value(rest[0], data, where)
    for kind in rest:
        if isinstance(data, kind) and not (isinstance(data, bool) and kind is not bool):
            return data
    raise ValueError(f"{where}: one of {', '.join(k.__name__ for k in rest)} is needed, got {_name(data)}")


def _free(data: object, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested more than {_MAX_DEPTH} deep")
    if isinstance(data, dict):
        return {key: _free(each, where, depth + 1) for key, each in data.items()}
    if isinstance(data, list):
        return [_free(each, where, depth + 1) for each in data]
    return data


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _name(data: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(data), f"{type(data).__name__} {data!r}")
