"""The manifest of an artifact: what is in the directory and how to call it (docs/artifact.md)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from memcompile.artifact.parse import build
from memcompile.artifact.step_bytes import StepBytes
from memcompile.errors import MemcompileError

FORMAT: Final = "memcompile-artifact"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_MAX_BYTES: Final = 64 * 2**20
DTYPES: Final = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool", "float64")
KINDS: Final = ("linear", "positions")
MASK_INPUT: Final = "attention_mask"

# Far above any model, far below what would make an allocation or a sum misbehave.
MAX_COUNT: Final = 2**20
MAX_TOKENS: Final = 2**32
MAX_BYTES: Final = 2**50


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """Facts about the model that running it needs. `max_positions` 0 means no limit."""

    family: str
    vocab_size: int = 0
    max_positions: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    causal: bool = True
    layers: int = 0
    parameters: int = 0
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One input or output of a function; a dim is a size or the name of a size."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class FunctionEntry:
    """One lowered graph: its file, inputs and outputs in call order.

    `kernel_file` computes the same with the operators `kernels` of the kernel library; `file` needs none.
    """

    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    kernel_file: str | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One key/value cache: its group, shape and the tensors that carry it in and out of `step`."""

    region: str
    group: str
    kv_heads: int
    head_dim: int
    key_in: str
    value_in: str
    key_out: str
    value_out: str
    bits: int = 0
    dtype: str = "float32"
    heads: int = 0
    observed_in: str | None = None
    observed_out: str | None = None
    # bounds of pages of so many keys, [batch, kv_heads, pages, 2 * stored_width], by which decoding chooses
    page_tokens: int = 0
    bounds_in: str | None = None
    bounds_out: str | None = None
    # [batch, neurons]: for how many tokens of the prompt a neuron of this layer was among the most active
    neurons: int = 0
    neurons_in: str | None = None
    neurons_out: str | None = None

    @property
    def stored_width(self) -> int:
        """Elements that one token of one head takes: int4 packs two channels a byte."""
        return self.head_dim // 2 if self.bits == 4 else self.head_dim


@dataclass(frozen=True, slots=True)
class EvictEntry:
    """What `compress` keeps of a group after prefill."""

    keep_tokens: int | None = None
    keep_fraction: float | None = None
    observe_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """Caches that hold the same positions. `window` 0: every earlier token stays visible."""

    name: str
    input: str
    kind: str = "linear"
    window: int = 0
    sinks: int = 0
    block: int = 0
    stride: int = 0
    evict: EvictEntry | None = None


@dataclass(frozen=True, slots=True)
class PrefillEntry:
    """How prompts are fed. `extend_tokens`: the most tokens of a call after the prompt; 0: a chunk."""

    chunk_tokens: int = 512
    extend_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChatEntry:
    """The text around one user message, and the strings that end an answer."""

    prefix: str
    suffix: str
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """The tokenizer's file (Hugging Face `tokenizers` JSON)."""

    file: str
    add_bos: bool = False
    chat: ChatEntry | None = None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Digest and size of one file of the directory."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that `manifest.json` says. Written by `ArtifactWriter`, read by `read_manifest`.

    step_bytes: predicted for the last token of the plan's workload; None for a model that is not causal.
    """

    backend: str
    model: ModelEntry
    functions: dict[str, FunctionEntry]
    device: str = "cpu"
    threads: int = 0
    states: tuple[StateEntry, ...] = ()
    groups: tuple[GroupEntry, ...] = ()
    prefill: PrefillEntry = field(default_factory=PrefillEntry)
    tokenizer: TokenizerEntry | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    calibrations: dict[str, Any] = field(default_factory=dict)
    decisions: tuple[Any, ...] = ()
    refusals: tuple[Any, ...] = ()
    gates: tuple[Any, ...] = ()
    step_bytes: StepBytes | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    def group(self, name: str) -> GroupEntry:
        """The group called `name`; every state's group exists (checked when read)."""
        return next(group for group in self.groups if group.name == name)

    def as_dict(self) -> dict[str, Any]:
        """The manifest as JSON values, `format` and `version` first."""
        values = asdict(self)
        head = {key: values.pop(key) for key in ("format", "version")}
        return {**head, **values}

    def as_json(self) -> str:
        """The text of `manifest.json`.

        Raises MC509 when a value is not JSON (a NaN, an infinity, an object).
        """
        try:
            return json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise MemcompileError(
                "MC509", f"the manifest holds a value that JSON cannot: {error}",
                fix="give finite numbers and texts only, in the plan, calibrations and gates alike",
            ) from error  # fmt: skip


def parse_manifest(text: str, where: str = MANIFEST) -> Manifest:
    """Read a manifest strictly: version first, then every key and type, then what refers to what.

    Raises MC502 (newer version) and MC505 (anything else that is wrong).
    """
    data = _json_object(text, where)
    if data.get("format") != FORMAT:
        raise _invalid(f"format is {data.get('format')!r}, not {FORMAT!r}", where)
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _invalid(f"version is {version!r}, not a positive whole number", where)
    if version > VERSION:
        raise MemcompileError(
            "MC502",
            f"the artifact has format version {version}, this memcompile reads up to {VERSION}",
            where=where,
            fix="upgrade memcompile, or make the artifact again with this version",
        )
    try:
        manifest = build(Manifest, data)
        _check(manifest)
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error) or "nested too deeply", where) from error
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json` of an artifact directory. Raises MC501, MC502, MC505."""
    path = directory / MANIFEST
    if not directory.is_dir() or not path.is_file():
        what = "no such directory" if not directory.is_dir() else f"the directory has no {MANIFEST}"
        raise MemcompileError(
            "MC501", f"there is no artifact at {directory}: {what}", where=str(directory),
            fix="give the directory that `memcompile optimize -o` wrote",
        )  # fmt: skip
    if path.stat().st_size > MANIFEST_MAX_BYTES:
        raise _invalid(f"{path.stat().st_size} bytes, more than the {MANIFEST_MAX_BYTES} allowed", str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _invalid("not UTF-8 text", str(path)) from error
    except OSError as error:
        raise MemcompileError(
            "MC506", f"the manifest cannot be read: {error}", where=str(path),
            fix="allow reading the file, or copy the whole directory again",
        ) from error  # fmt: skip
    return parse_manifest(text, str(path))


def _json_object(text: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"not readable as JSON: {error or 'nested too deeply'}", where) from error
    if not isinstance(data, dict):
        raise _invalid(f"a {type(data).__name__}, not an object", where)
    return data


def _invalid(message: str, where: str) -> MemcompileError:
    return MemcompileError(
        "MC505", f"the manifest is not valid: {message}", where=where,
        fix="make the artifact again, or copy it again from where it was made",
    )  # fmt: skip


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, outside {low}..{high}")


def _check(manifest: Manifest) -> None:
    _range("threads", manifest.threads, 0, 4096)
    _range("prefill.chunk_tokens", manifest.prefill.chunk_tokens, 1, MAX_TOKENS)
    _range("prefill.extend_tokens", manifest.prefill.extend_tokens, 0, MAX_TOKENS)
    model = manifest.model
    _range("model.vocab_size", model.vocab_size, 0, MAX_TOKENS)
    _range("model.max_positions", model.max_positions, 0, MAX_TOKENS)
    _range("model.layers", model.layers, 0, MAX_COUNT)
    if manifest.step_bytes is not None:
        for name, value in manifest.step_bytes.as_dict().items():
            _range(f"step_bytes.{name}", value, 0, MAX_BYTES)
    for name, file in manifest.files.items():
        _range(f"files.{name}.bytes", file.bytes, 0, MAX_BYTES)
        if len(file.sha256) != 64 or set(file.sha256) - set("0123456789abcdef"):
            raise ValueError(f"files.{name}.sha256 is not a sha256 digest in lower-case hexadecimal")
    if "step" not in manifest.functions and "forward" not in manifest.functions:
        raise ValueError(
            f"functions are {sorted(manifest.functions)}: neither step nor forward is among them"
        )
    for name, function in manifest.functions.items():
        _check_function(f"functions.{name}", function)
    names = [group.name for group in manifest.groups]
    if len(set(names)) != len(names):
        raise ValueError(f"two groups have the same name: {names}")
    step = manifest.functions.get("step")
    inputs = {tensor.name for tensor in step.inputs} if step else set()
    outputs = {tensor.name for tensor in step.outputs} if step else set()
    for group in manifest.groups:
        _check_group(f"groups.{group.name}", group, inputs)
    for state in manifest.states:
        _check_state(f"states.{state.region}", state, manifest, inputs, outputs)


def _check_function(where: str, function: FunctionEntry) -> None:
    for kind, tensors in (("inputs", function.inputs), ("outputs", function.outputs)):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            raise ValueError(f"{where}.{kind}: a name stands twice: {names}")
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{where}.{kind}.{tensor.name}: dtype {tensor.dtype!r} is not one of {DTYPES}"
                )
            for dim in tensor.dims:
                if isinstance(dim, int):
                    _range(f"{where}.{kind}.{tensor.name} dim", dim, 0, MAX_TOKENS)


def _check_group(where: str, group: GroupEntry, inputs: set[str]) -> None:
    if group.kind not in KINDS:
        raise ValueError(f"{where}.kind is {group.kind!r}, not one of {KINDS}")
    if group.input not in inputs:
        raise ValueError(f"{where}.input: step has no input {group.input!r}")
    for name in ("window", "sinks", "block", "stride"):
        _range(f"{where}.{name}", getattr(group, name), 0, MAX_TOKENS)
    if group.stride and not group.block:
        raise ValueError(f"{where}: stride is {group.stride} but block is 0")
    if group.kind == "linear" and group.window:
        raise ValueError(f"{where}: a linear group sees every slot, but window is {group.window}")
    if group.kind == "positions" and group.evict:
        raise ValueError(f"{where}: only linear groups are evicted")
    if group.evict is not None:
        _range(f"{where}.evict.observe_tokens", group.evict.observe_tokens, 0, MAX_TOKENS)
        if (group.evict.keep_tokens is None) == (group.evict.keep_fraction is None):
            raise ValueError(f"{where}.evict: give exactly one of keep_tokens and keep_fraction")


def _check_state(
    where: str, state: StateEntry, manifest: Manifest, inputs: set[str], outputs: set[str]
) -> None:
    if state.group not in {group.name for group in manifest.groups}:
        raise ValueError(f"{where}.group: there is no group {state.group!r}")
    for name in ("kv_heads", "head_dim"):
        _range(f"{where}.{name}", getattr(state, name), 1, MAX_COUNT)
    _range(f"{where}.heads", state.heads, 0, MAX_COUNT)
    wanted = {0: ("float32", "float16", "bfloat16"), 8: ("int8",), 4: ("uint8",)}.get(state.bits)
    if wanted is None:
        raise ValueError(f"{where}.bits is {state.bits}, not 0, 8 or 4")
    if state.dtype not in wanted:
        raise ValueError(f"{where}.dtype is {state.dtype!r}; with bits {state.bits} it is one of {wanted}")
    if state.dtype == "bfloat16" and manifest.group(state.group).evict is not None:
        raise ValueError(f"{where}.dtype is 'bfloat16', which no `compress` function takes or gives")
    for field_name in ("key_in", "value_in", "observed_in", "bounds_in", "neurons_in"):
        name = getattr(state, field_name)
        if name is not None and name not in inputs:
            raise ValueError(f"{where}.{field_name}: step has no input {name!r}")
    for field_name in ("key_out", "value_out", "observed_out", "bounds_out", "neurons_out"):
        name = getattr(state, field_name)
        if name is not None and name not in outputs:
            raise ValueError(f"{where}.{field_name}: step has no output {name!r}")
    if (state.observed_in is None) != (state.observed_out is None):
        raise ValueError(f"{where}: observed_in and observed_out go together")
    _range(f"{where}.page_tokens", state.page_tokens, 0, MAX_COUNT)
    if len({state.bounds_in is None, state.bounds_out is None, not state.page_tokens}) != 1:
        raise ValueError(f"{where}: page_tokens, bounds_in and bounds_out go together")
    _range(f"{where}.neurons", state.neurons, 0, MAX_COUNT)
    if len({state.neurons_in is None, state.neurons_out is None, not state.neurons}) != 1:
        raise ValueError(f"{where}: neurons, neurons_in and neurons_out go together")
    group = manifest.group(state.group)
    if state.page_tokens and (group.window or group.evict is not None):
        raise ValueError(f"{where}: page_tokens needs every token, and group {state.group!r} drops some")
    if state.observed_in is not None and manifest.group(state.group).evict is None:
        raise ValueError(f"{where}: observed queries, but group {state.group!r} is not evicted")
