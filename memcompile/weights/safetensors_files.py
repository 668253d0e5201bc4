"""The tensors of a Hugging Face folder's safetensors files, as expressions; nothing but headers is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch

from memcompile.errors import MemcompileError
from memcompile.weights.lazy import LazyTensor, Stored, version_of

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_LENGTH_BYTES: Final = 8
_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def folder_tensors(folder: Path) -> dict[str, LazyTensor] | None:
    """The folder's tensors by name; None when it has no safetensors files.

    Raises MC202 for a file that is missing, cut off, not safetensors or outside the folder.
    """
    if (folder / INDEX).is_file():
        index = _json((folder / INDEX).read_bytes(), folder / INDEX)
        files = _files_of(index, folder / INDEX)
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        return None
    found: dict[str, LazyTensor] = {}
    for name in files:
        found |= file_tensors(folder / name)
    return found


def _files_of(index: dict[str, Any], path: Path) -> list[str]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise _broken(path, "its weight_map is not a table of file names")
    for name in names.values():
        if Path(name).name != name:
            raise _broken(path, f"it names {name!r}, which is not a file of the folder")
    return sorted(set(names.values()))


def file_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file by name. Raises MC202."""
    try:
        version = version_of(str(path))
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= total - _LENGTH_BYTES:
                raise _broken(path, f"its header would take {length} of {total} bytes")
            header = _json(file.read(length), path)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    begin = _LENGTH_BYTES + length
    found: dict[str, LazyTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
            first, last = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, f"the entry of {name} is not one this package reads ({error})") from error
        tensor = Stored(str(path.resolve()), begin + first, shape, dtype, version)
        if min(first, *shape, 0) < 0 or last - first != tensor.nbytes or begin + last > total:
            raise _broken(path, f"{name} does not fit the file")
        found[name] = tensor
    return found


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        read = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(read, dict):
        raise _broken(path, "its header is not a table")
    return read


def _broken(path: Path, why: str) -> MemcompileError:
    return MemcompileError(
        "MC202", f"{path.name} could not be read: {why}", where=str(path),
        fix="check that the files are whole",
    )  # fmt: skip
