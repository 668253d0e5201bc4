"""The sections of a plan: every key, its type, range and meaning. docs/plan.md is written from this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memcompile.plan.units import Bytes, Share

VERSION: Final = 1
TEXT_SUFFIXES: Final = (".txt", ".txt.gz", ".txt.xz")


class Section(BaseModel):
    """Frozen, and closed: a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """What is compiled."""

    source: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="folder, `.gguf` file or `package.module:function`; the command line may give it instead",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="type of weights, activations and cache; "
        "in bfloat16 the CPU's kernels round what they multiply",
    )
    weights: Literal["stored", "float32"] = Field(
        "stored",
        description="of a `.gguf` file: keep its codes as they are stored, or take the floats they stand for",
    )
    activations: Literal["float", "int8"] = Field(
        "float",
        description="what kept codes are multiplied with: floats (exact), or rounded to int8 (faster)",
    )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Target(Section):
    """Where the artifact runs."""

    backend: Literal["onnxruntime", "torch", "tvm"] = Field(
        "onnxruntime", description="what executes the artifact"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="the device it executes on")
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        default_factory=_usable_cores,
        description="threads of the runtime; all cores of this machine if not given",
    )


class Workload(Section):
    """The use that cost is predicted for and speed is measured at."""

    prompt_tokens: Annotated[int, Field(ge=1)] = Field(2048, description="tokens of a prompt")
    new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="tokens generated after it")
    batch: Annotated[int, Field(ge=1)] = Field(1, description="prompts at once")


class Text(Section):
    """A text, and how much of it is used."""

    text: str = Field(description="`.txt`, `.txt.gz` or `.txt.xz`, relative to the plan")
    tokens: Annotated[int, Field(ge=2)] = Field(16384, description="tokens read from it")


class Data(Section):
    """Texts that calibration and evaluation read. They should not be the same text."""

    calibration: Text | None = Field(None, description="what scales and scores are calibrated on")
    evaluation: Text | None = Field(None, description="what perplexity and KL are measured on")


class Gate(Section):
    """Limits that the artifact must keep to. At least one is given."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("the gate has no limit")
        return self


class PerplexityGate(Gate):
    """Perplexity on the evaluation text."""

    max_increase: Share | None = Field(None, description="increase over the original, as a share of it")
    max: Annotated[float, Field(gt=0)] | None = Field(None, description="perplexity itself")


class KlGate(Gate):
    """Mean KL divergence of the next-token distributions from the original's, in nats."""

    max: Annotated[float, Field(ge=0)] | None = Field(None, description="nats per token")


class PasskeyGate(Gate):
    """Share of passkeys, hidden at several depths of a long prompt, that are given back."""

    min_accuracy: Annotated[Share, Field(le=1)] | None = Field(None, description="share of passkeys found")


class BytesGate(Gate):
    """Bytes measured in the running artifact."""

    max: Bytes | None = Field(None, description="bytes, or a size with a unit: `24MiB`")


class SpeedGate(Gate):
    """Time of the original divided by time of the rewritten model, on the same backend."""

    min: Annotated[float, Field(gt=0)] | None = Field(None, description="ratio; 1.5 is half as fast again")


class Gates(Section):
    """What must hold for the artifact to be kept. An unmet gate ends the command with exit code 5."""

    perplexity: PerplexityGate | None = Field(None, description="perplexity on the evaluation text")
    kl: KlGate | None = Field(None, description="KL to the original on the evaluation text")
    passkey: PasskeyGate | None = Field(None, description="passkey retrieval")
    state_bytes: BytesGate | None = Field(
        None, description="bytes allocated for state, in the running artifact"
    )
    peak_memory: BytesGate | None = Field(
        None, description="peak memory of the process that runs the artifact"
    )
    prefill_speedup: SpeedGate | None = Field(
        None, description="time to first token, original over rewritten"
    )
    decode_speedup: SpeedGate | None = Field(None, description="time per token, original over rewritten")

    def limits(self) -> tuple[Limit, ...]:
        """All limits, in the order of the schema."""
        return tuple(self._limits())

    def _limits(self) -> Iterator[Limit]:
        for gate in type(self).model_fields:
            section = getattr(self, gate)
            for key in type(section).model_fields if section else ():
                if (value := getattr(section, key)) is not None:
                    yield Limit(gate, key, float(value))


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of one gate: `Limit("perplexity", "max_increase", 0.02)`."""

    gate: str
    key: str
    value: float
