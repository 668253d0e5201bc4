"""Model sources: a Hugging Face folder, a GGUF file, or an importable factory. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memcompile.errors import MemcompileError
from memcompile.frontend.lazy_gguf import parsed_once, read_gguf
from memcompile.frontend.lazy_model import lazy_model
from memcompile.weights.lazy import LazyTensor
from memcompile.weights.parameter import materialise
from memcompile.weights.safetensors_files import folder_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class LoadedModel:
    """A live model with what came along: tokenizer, for factories example inputs, the GGUF file it is of."""

    module: torch.nn.Module
    tokenizer: Any = None
    folder: Path | None = None
    example_inputs: Any = None
    gguf: Path | None = None


def load_source(source: str, dtype: str | None = None, *, lazy: bool = False) -> LoadedModel:
    """Load a model source given as text.

    A folder or file that exists is read as such; `package.module:function` is imported and called.
    lazy: weights of files stay on disk; whatever computes with one reads it then, and forgets it again.
    Raises MC201 when nothing is there, MC202 when it is not a model, MC206 when a package is missing.
    """
    path = Path(source)
    if path.is_dir():
        loaded = _load_folder(path, dtype)
    elif path.is_file():
        loaded = _load_file(path, dtype)
    elif ":" in source and not source.endswith((".gguf", ".safetensors")):
        loaded = _load_factory(source)
    else:
        raise MemcompileError(
            "MC201",
            f"{source}: no such folder, file or factory",
            where=source,
            fix="give a Hugging Face folder, a .gguf file, or package.module:function; nothing is downloaded",
        )
    if not lazy:
        materialise(loaded.module)
    return loaded


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from asking a hub and from printing progress of its own."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # the GGUF reader draws a bar of its own on stderr whatever the settings say
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _load_folder(folder: Path, dtype: str | None) -> LoadedModel:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise MemcompileError(
            "MC202",
            f"{folder} has no config.json",
            where=str(folder),
            fix="give a folder written by save_pretrained, or a .gguf file",
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MemcompileError(
            "MC202",
            f"config.json is not JSON: {error}",
            where=str(config_file),
            fix="write the folder again with save_pretrained, or download config.json again",
        ) from error
    name = _architecture(config, config_file)
    tensors = None if "quantization_config" in config else folder_tensors(folder)
    return _from_pretrained(folder, name, dtype, {}, tensors)


def _load_file(path: Path, dtype: str | None) -> LoadedModel:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != GGUF_MAGIC:
        raise MemcompileError(
            "MC202",
            f"{path.name} is not a GGUF file (it begins with {magic!r}, GGUF files with {GGUF_MAGIC!r})",
            where=str(path),
            fix="give a .gguf file or a Hugging Face folder",
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MemcompileError(
                "MC206", f"reading GGUF files needs the package {package}", fix=f"pip install {package}"
            )
    return _from_pretrained(path.parent, "AutoModelForCausalLM", dtype, {"gguf_file": path.name})


def _architecture(config: dict[str, Any], where: Path) -> str:
    names = config.get("architectures") or []
    import transformers

    for name in names:
        if hasattr(transformers, name):
            return str(name)
    if names or "model_type" not in config:
        raise MemcompileError(
            "MC203",
            f"architecture {names or config.get('model_type')} is not part of the installed transformers",
            where=str(where),
            fix="pass the live nn.Module, or a factory package.module:function, instead of the folder",
        )
    return "AutoModel"


def _from_pretrained(
    folder: Path,
    class_name: str,
    dtype: str | None,
    extra: dict[str, str],
    tensors: Mapping[str, LazyTensor] | None = None,
) -> LoadedModel:
    """Load a model; with `tensors`, its parameters stand for these and none is read."""
    import transformers

    where = str(folder / extra.get("gguf_file", ""))
    with _offline(), parsed_once() if extra else contextlib.nullcontext():
        try:
            gguf = read_gguf(folder / extra["gguf_file"]) if extra else None
            if gguf is not None:
                module = lazy_model(
                    folder, gguf.class_name, DTYPES[dtype or "float32"], gguf.tensors, gguf.config
                )
            elif tensors is not None:
                module = lazy_model(folder, class_name, DTYPES[dtype or "float32"], tensors)
            else:
                module = getattr(transformers, class_name).from_pretrained(
                    folder,
                    dtype=DTYPES[dtype or "float32"],
                    trust_remote_code=False,
                    local_files_only=True,
                    **extra,
                )
        except MemcompileError:
            raise
        except Exception as error:
            raise MemcompileError(
                "MC202",
                f"transformers could not load it: {error}",
                where=where,
                fix="check that the files are whole",
            ) from error
        tokenizer = None
        if extra or any((folder / n).exists() for n in ("tokenizer.json", "tokenizer_config.json")):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True, **extra
                )
            except Exception as error:
                raise MemcompileError(
                    "MC202",
                    f"the tokenizer could not be read: {error}",
                    where=where,
                    fix="use a Hugging Face folder: transformers does not read this file's tokenizer"
                    if extra
                    else "write tokenizer.json and tokenizer_config.json again, or remove both to go without",
                ) from error
    if extra:
        _forget_the_format(module)
    file = folder / extra["gguf_file"] if extra else None
    return LoadedModel(module.eval(), tokenizer, None if extra else folder, gguf=file)


def _forget_the_format(module: Any) -> None:
    """Weights read from a GGUF file are plain floats again; transformers would still refuse to save them."""
    for owner, name in ((module, "hf_quantizer"), (module.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _load_factory(source: str) -> LoadedModel:
    module_name, _, function_name = source.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise MemcompileError(
            "MC201",
            f"{source}: {error}",
            where=source,
            fix="give package.module:function, importable from here",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    made = factory()
    module, examples = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise MemcompileError(
            "MC202",
            f"{source} returned {type(module).__name__}, not an nn.Module",
            where=source,
            fix="return a module, or (module, example_inputs)",
        )
    return LoadedModel(module.eval(), example_inputs=examples)
