"""`kv.quantize`: hold keys and values as 8- or 4-bit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData, collect
from memcompile.calibrate.statistics import ChannelRange
from memcompile.dialect import Cost
from memcompile.progress import Progress
from memcompile.regions import AttentionRegion, Refusal, argument
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.fingerprint import graph_text
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset


class QuantizeConfig(PassConfig):
    """Bits of a cache element, and how its range is found."""

    bits: Literal[8, 4] | None = Field(
        default=8, description="of a key or value element; none: leave the cache alone"
    )
    clip_percentile: float = Field(
        default=100.0,
        gt=50.0,
        le=100.0,
        description="percentile of the calibrated magnitudes that the largest code stands for",
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: object) -> object:
        # YAML reads a bare none as text
        return None if value == "none" else value


@dataclass(frozen=True, slots=True)
class QuantizeFacts:
    """Bits of the cache, and the largest code."""

    bits: Literal[8, 4]

    @property
    def largest_code(self) -> int:
        return 127 if self.bits == 8 else 7


class QuantizeCache(Pass[AttentionRegion, QuantizeConfig, QuantizeFacts]):
    """Hold the key/value cache as 8-bit or 4-bit codes with one calibrated scale per channel.

    Rewrites:  the cache of a causal attention region; attention reads what the codes stand for, from the
               first token on, also for the new tokens of a call.
    Needs:     calibration text: the range of every channel is measured once and remembered by content.
    Refuses:   attention that is not causal (it has no cache), caches already quantised, 4 bits for an odd
               head width (two codes share a byte).
    Loses:     about 0.4% of a channel's range per element at 8 bits, 7% at 4; magnitudes beyond the
               calibrated range are clipped.
    Costs:     a scale per channel; saves 3/4 of a float32 cache at 8 bits, 7/8 at 4. ONNX Runtime's CPU
               kernel reads codes about 3 times slower than floats while it reads a prompt (decision 0007).
    Identity:  bits none.
    Presets:   int8, int4: symmetric, static, per channel, as ONNX Runtime's GroupQueryAttention reads them
    """

    name: ClassVar[str] = "kv.quantize"
    Config: ClassVar[type[QuantizeConfig]] = QuantizeConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"float_cache"}),
        after=frozenset({"kept_heads", "visibility", "kept_tokens"}),
        provides=frozenset({"cache_bits"}),
        invalidates=frozenset({"float_cache"}),
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "int8": Preset(
            {"bits": 8},
            "static symmetric per-channel codes of ONNX Runtime's GroupQueryAttention (com.microsoft)",
            "Eight bits an element: a quarter of a float32 cache.",
        ),
        "int4": Preset(
            {"bits": 4},
            "static symmetric per-channel codes of ONNX Runtime's GroupQueryAttention (com.microsoft); "
            "Liu et al. 2024, KIVI, arXiv:2402.02750, on why keys want one scale per channel",
            "Four bits an element, two in a byte. Unlike KIVI there are no groups of tokens, no zero "
            "points and no recent tokens in full precision: check the quality.",
        ),
    }

    def identity(self) -> QuantizeConfig:
        return QuantizeConfig(bits=None)

    def budgets(self) -> tuple[QuantizeConfig, QuantizeConfig]:
        return QuantizeConfig(bits=4), QuantizeConfig(bits=8)

    def changes_nothing(self, config: QuantizeConfig, workload: Workload) -> str | None:
        del workload
        return "bits is none, so the cache would stay as it is" if config.bits is None else None

    def check(
        self, region: AttentionRegion, config: QuantizeConfig, context: Context = NO_CONTEXT
    ) -> QuantizeFacts | Refusal:
        del context
        if config.bits is None:
            return self.refuse(region, "bits is none")
        if not argument(region.node, "causal"):
            return self.refuse(
                region, f"its mask is {region.mask.kind}: attention that is not causal has no cache"
            )
        if region.bits:
            return self.refuse(region, f"its cache is already quantised to {region.bits} bits")
        if config.bits == 4 and region.head_dim % 2:
            return self.refuse(region, f"its heads are {region.head_dim} wide, and 4-bit codes come in pairs")
        return QuantizeFacts(config.bits)

    def needs_calibration(self, config: QuantizeConfig) -> bool:
        return config.bits is not None

    def calibrate(
        self,
        graph_module: fx.GraphModule,
        regions: Sequence[AttentionRegion],
        config: QuantizeConfig,
        data: CalibrationData,
        progress: Progress,
    ) -> Calibration:
        return collect(
            graph_module,
            [region.region for region in regions],
            ChannelRange(config.clip_percentile),
            data,
            graph_key=graph_text(graph_module),
            progress=progress,
        )

    def rewrite(self, region: AttentionRegion, facts: QuantizeFacts, emit: Emit) -> None:
        scales = {
            f"{name}_scale": emit.buffer(
                f"attention_{region.region}_{name}_scale",
                symmetric_scale(emit.statistics[name], facts.largest_code),
                before=region.node,
            )
            for name in ("k", "v")
        }
        emit.update(region.node, bits=facts.bits, **scales)

    def cost(self, region: AttentionRegion, facts: QuantizeFacts, workload: Workload) -> Cost:
        return decode_cost(region, workload, bits=facts.bits)


def symmetric_scale(range_GD: torch.Tensor, largest_code: int) -> torch.Tensor:
    """Scales float32 [G*D] at which `largest_code` stands for each channel's range.

    A channel that was zero throughout calibration takes the mean scale of its head, so that a value it does
    show one day is neither divided by zero nor lost.
    """
    scale = range_GD.float() / largest_code
    silent = scale <= torch.finfo(torch.float32).tiny
    heard = (~silent).sum(dim=1, keepdim=True).clamp(min=1)
    fallback = scale.masked_fill(silent, 0.0).sum(dim=1, keepdim=True) / heard
    fallback = torch.where(fallback > 0, fallback, torch.ones_like(fallback))
    return torch.where(silent, fallback, scale).reshape(-1)
