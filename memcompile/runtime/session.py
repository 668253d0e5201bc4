"""Run the artifact of an ONNX Runtime backend: prefill in chunks, decode without copying a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import onnxruntime as ort
from numpy.typing import NDArray

from memcompile.artifact import Artifact, FunctionEntry
from memcompile.errors import MemcompileError
from memcompile.kernels import find_library
from memcompile.runtime.base import BaseSession
from memcompile.runtime.binding import StepBinding
from memcompile.runtime.cache import State

PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session(BaseSession):
    """An opened artifact. Made by `memcompile.runtime.load`; not for two threads at once."""

    backend = "onnxruntime"

    def _open(self, name: str) -> Any:
        return open_function(self.artifact, name, self.provider, self.threads)

    def _bind(self, state: State) -> StepBinding:
        return StepBinding(self._function("step"), self.manifest, state)

    def _run(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        outputs = [tensor.name for tensor in self.manifest.functions[name].outputs]
        results: list[NDArray[Any]] = self._function(name).run(outputs, feeds)
        return results


def open_function(artifact: Artifact, name: str, provider: str, threads: int) -> Any:
    """Open one graph of an artifact and check that it is what the manifest says.

    Raises MC112 (unknown provider), MC511 (not available), MC505 (does not load, or has other inputs).
    """
    entry = artifact.manifest.functions[name]
    providers = provider_list(provider)
    options = session_options(name, threads)
    file = entry.file
    if entry.kernel_file is not None and provider == "cpu" and (library := find_library()) is not None:
        options.register_custom_ops_library(str(library.path))
        file = entry.kernel_file
    try:
        session = ort.InferenceSession(str(artifact.file(file)), options, providers=providers)
    except Exception as error:
        made_with = artifact.manifest.environment.get("onnxruntime", "another version")
        raise MemcompileError(
            "MC505", f"ONNX Runtime {ort.__version__} does not load {file}: {error}",
            where=str(artifact.path / file),
            fix=f"install the onnxruntime it was made with ({made_with}), or make the artifact again",
        ) from error  # fmt: skip
    if PROVIDERS[provider] not in session.get_providers():
        raise _unavailable(provider, f"ONNX Runtime fell back to {', '.join(session.get_providers())}")
    _check_interface(artifact, name, entry, session)
    return session


def provider_list(provider: str) -> list[Any]:
    """ONNX Runtime's providers for "cpu" or "cuda", in order."""
    if provider not in PROVIDERS:
        raise MemcompileError(
            "MC112", f"unknown provider {provider!r}", fix=f"use one of {', '.join(sorted(PROVIDERS))}"
        )
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise _unavailable(provider, f"this ONNX Runtime has {', '.join(ort.get_available_providers())}")
    if provider == "cpu":
        return [PROVIDERS["cpu"]]
    return [(PROVIDERS["cuda"], {"arena_extend_strategy": "kSameAsRequested"}), PROVIDERS["cpu"]]


def session_options(function: str, threads: int) -> Any:
    """Options that keep peak memory low; docs/artifact.md has the measurements."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # patterns are remembered per shape, and every chunk and step has another one
    options.enable_mem_pattern = False
    # long enough to bridge two operators, short enough not to starve a neighbour
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    # what `compress` needed for a moment must not stay allocated next to the caches it made smaller
    options.enable_cpu_mem_arena = function == "step"
    return options


def _unavailable(provider: str, why: str) -> MemcompileError:
    return MemcompileError(
        "MC511", f"provider {provider!r} is not available: {why}",
        fix="install memcompile[gpu] and a CUDA driver, or pass provider='cpu'",
    )  # fmt: skip


def _check_interface(artifact: Artifact, name: str, entry: FunctionEntry, session: Any) -> None:
    given = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    required = {value.name for value in session.get_inputs()}
    listed = {tensor.name for tensor in entry.inputs}
    made = {value.name for value in session.get_outputs()}
    wanted = {tensor.name for tensor in entry.outputs}
    for what, wrong in (
        ("inputs that the graph does not have", listed - given),
        ("not the inputs that the graph needs", required - listed),
        ("outputs that the graph does not have", wanted - made),
    ):
        if wrong:
            raise MemcompileError(
                "MC505", f"functions.{name} lists {what}: {', '.join(sorted(wrong))}",
                where=str(artifact.path / entry.file),
                fix="copy the whole directory again, or make the artifact again",
            )  # fmt: skip
