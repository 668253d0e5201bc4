"""Two passes that stand in for real ones, so that plan tests load no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EvictConfig(_Config):
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("keep_tokens", "keep_fraction"),)
    scorer: Literal["snapkv", "knorm"] = Field("snapkv", description="what a token is worth")
    keep_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="tokens kept by each head")
    keep_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    observe_tokens: Annotated[int, Field(ge=1)] = 32
    pools: tuple[int, ...] = (7,)


class QuantizeConfig(_Config):
    bits: Literal[0, 4, 8] = 8
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


@dataclass(frozen=True, slots=True)
class FakePreset:
    values: Mapping[str, Any]
    paper: str = "arXiv:0000.00000"


@dataclass(frozen=True, slots=True)
class FakePass:
    Config: type[BaseModel]
    presets: Mapping[str, FakePreset] = field(default_factory=dict)
    takes_heads: bool = True


class FakeLibrary:
    def __init__(self) -> None:
        self.passes = {
            "kv.evict": FakePass(
                EvictConfig,
                {
                    "snapkv": FakePreset({"scorer": "snapkv", "keep_fraction": 0.25}),
                    "knorm": FakePreset({"scorer": "knorm", "keep_tokens": 64, "layers": "2-5"}),
                },
            ),
            "kv.quantize": FakePass(QuantizeConfig, takes_heads=False),
        }

    def names(self) -> tuple[str, ...]:
        return tuple(self.passes)

    def load(self, name: str) -> FakePass:
        return self.passes[name]
