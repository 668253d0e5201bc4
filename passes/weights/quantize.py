"""`weights.quantize`: store the weights of linear layers and of the embedding as 8-, 4- or 3-bit codes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.dialect import Cost
from memcompile.dialect.quantized_embedding import quantized_embedding_cost
from memcompile.dialect.quantized_experts import quantized_experts_cost
from memcompile.dialect.quantized_linear import quantized_linear_cost
from memcompile.dialect.quantized_weights import QuantizedWeight
from memcompile.errors import MemcompileError
from memcompile.passes.weights import distil
from memcompile.passes.weights.calibrated import Recipe, calibrate_codes, calibrated_weight
from memcompile.passes.weights.choose import choose_bits, joined
from memcompile.passes.weights.experts import ExpertsRegion, expert_regions, quantize_experts
from memcompile.passes.weights.inputs import drop_input, prepared_input
from memcompile.passes.weights.quantize_presets import PRESETS
from memcompile.progress import Progress
from memcompile.regions import Refusal, WeightRegion, argument, weight_regions
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset
from memcompile.weights.codebook import quantize_without_data
from memcompile.weights.methods import ZeroPoint
from memcompile.weights.place import operands
from memcompile.weights.scaling import ScaleInputs

Block = Literal[16, 32, 64, 128, 256]
aten: Any = torch.ops.aten


class WeightsConfig(PassConfig):
    """Which weights, how many bits, and how the codes are found."""

    exclusive = (("average_bits", "max_bytes", "max_loss"),)

    bits: Literal[8, 4, 3, "mixed"] | None = Field(
        default=8,
        description="of a weight; 3: for method kmeans; mixed: 8 or 4 by weight, under one of the three "
        "budgets; none: leave the weights alone",
    )
    average_bits: Annotated[float, Field(ge=4, le=8)] | None = Field(
        default=None, description="bits mixed: of a code, the mean over weights; scales come on top"
    )
    max_bytes: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="bits mixed: of all codes, scales and zero points"
    )
    max_loss: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="bits mixed: the predicted divergence from the model's own logits, nats a token",
    )
    block_size: Block = Field(default=32, description="inputs that share a scale")
    zero_point: ZeroPoint = Field(
        default="none",
        description="what a block has besides its scale: nothing (codes are symmetric), the code that stands "
        "for zero, or the float it is shifted by (exact, but read by a second, small product)",
    )
    method: Literal["rtn", "hqq", "kmeans", "clip", "gptq"] = Field(
        default="rtn",
        description="round to nearest, half-quadratic quantisation, or kmeans, whose codes number a table of "
        "values that each weight has of its own (none of these needs data); on calibration text: clip, where "
        "each block's range shrinks to where outputs change least, or GPTQ",
    )
    weigh_inputs: bool = Field(
        default=False,
        description="method kmeans: an error of a weight counts by the mean square of its input on "
        "calibration text; without, all count the same",
    )
    spread_errors: bool = Field(
        default=False, description="method kmeans: codes are found column by column, as GPTQ finds them"
    )
    clip: bool = Field(default=False, description="method gptq: its grids are found as those of clip are")
    scale_inputs: ScaleInputs = Field(
        default="none",
        description="before rounding, divide each input of a product, and multiply its column of the weight, "
        "by a power of the input's mean magnitude (AWQ), or of its largest one over the weight's "
        "(SmoothQuant); on calibration text",
    )
    scale_exponent: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="that power; none: the one whose outputs change least, for each input"
    )
    shift_inputs: bool = Field(
        default=False,
        description="also centre each input between its extremes on calibration text; biases make up for it",
    )
    recover: Literal["none", "distil"] = Field(
        default="none",
        description="after rounding, train on calibration text: distil, the scales of blocks of linear "
        "layers, to give the predictions that the model of the plan gives before any pass",
    )
    recover_steps: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=32, description="recover: steps, each on one window of the text"
    )
    recover_learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=3e-3,
        description="recover: that of AdamW at the first step, for factors of the scales; it falls to 0 in a "
        "line",
    )
    activations: Literal["int8", "float"] = Field(
        default="int8",
        description="what the kernel multiplies the codes by: activations rounded to int8 a block, or floats "
        "(slower; 8-bit codes are then multiplied as two halves); floats for method kmeans",
    )
    lm_head: bool = Field(default=True, description="quantise the product that gives the logits")
    embedding: bool = Field(
        default=True,
        description="quantise the token embedding; one that is tied to the head shares its codes",
    )
    experts: bool = Field(
        default=True,
        description="quantise the experts of mixtures; by rounding or HQQ, and without float zero points or "
        "tables",
    )
    modules: list[str] | None = Field(
        default=None,
        description='globs on module paths, such as "*.mlp.*" or "!*.down_proj" to leave some out',
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: object) -> object:
        # YAML reads a bare none as text
        return None if value == "none" else value

    @model_validator(mode="after")
    def _mixed_has_a_budget(self) -> WeightsConfig:
        given = [name for name in self.exclusive[0] if getattr(self, name) is not None]
        if (self.bits == "mixed") != (len(given) == 1):
            raise ValueError(
                "bits: mixed takes one of average_bits, max_bytes and max_loss, and they are for it alone; "
                f"bits is {self.bits}, given: {', '.join(given) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _tables_have_a_format_of_their_own(self) -> WeightsConfig:
        if self.method != "kmeans":
            for name, given in (
                ("bits", self.bits == 3),
                ("weigh_inputs", self.weigh_inputs),
                ("spread_errors", self.spread_errors),
            ):
                if given:
                    raise ValueError(
                        f"{name}: {getattr(self, name)} is for method kmeans; method is {self.method}"
                    )
        elif self.bits in (8, "mixed"):
            raise ValueError(f"method kmeans has tables for bits 4 and 3; bits is {self.bits}")
        elif self.clip:
            raise ValueError("clip is for method gptq; method is kmeans")
        elif self.zero_point != "none":
            raise ValueError(
                f"method kmeans has a table, and no zero points; zero_point is {self.zero_point}"
            )
        return self


@dataclass(frozen=True, slots=True)
class WeightsFacts:
    """The format of one weight. bits: where they are mixed, the most; share: of those bytes, expected.

    chosen: what the plan did not spell out.
    """

    bits: int
    block: int
    zero_point: ZeroPoint
    method: str
    int8_activations: bool
    share: float = 1.0
    chosen: str = ""

    @property
    def format(self) -> tuple[object, ...]:
        """What two uses of one weight must agree on to share its codes."""
        return (self.bits, self.block, self.zero_point, self.method)


class QuantizeWeights(Pass[WeightRegion | ExpertsRegion, WeightsConfig, WeightsFacts]):
    """Store weights of linear layers and of the token embedding as 8-, 4- or 3-bit codes in blocks.

    Rewrites:  linear layers, the product that gives the logits, the embedding of tokens, and experts.
               `layers` narrows it to layers (head and embedding are outside of all), `modules` to paths.
    Needs:     calibration text for methods clip and gptq, scale_inputs, shift_inputs, weigh_inputs,
               spread_errors and recover; without these rtn, hqq and kmeans look at the weights alone.
    Refuses:   weights that are computed at run time, weights already quantised.
    Loses:     at most half a step a weight: 0.4% of a block's largest magnitude at 8 bits, 7% at 4 bits;
               int8 activations lose another 0.4% of a block's largest input. The steps of a table (kmeans)
               are finer where more of the weights are.
    Costs:     a float32 scale a block (1 bit a weight at 32), and as much again with float zero points; saves
               3/4 of float32 weights at 8 bits, 27/32 at 4, 7/8 at 3 (block 32). Decoding reads that much
               less. A table takes 64 bytes a matrix; without the kernel library ONNX Runtime makes floats of
               its codes on loading, and TVM artifacts store floats. Recovery takes two forward passes and one
               backward pass a step, and 20 bytes of memory a block.
    Identity:  bits none.
    Presets:   int8, int8_smooth, int8_smoothquant, int8_mptq, int4, int4_hqq, int4_awq, int4_gptq,
               int4_awq_gptq, int4_distilled, mixed_5bit: as ONNX Runtime's MatMulNBits reads them;
               int4_kmeans, int4_kmeans_gptq, int4_kmeans_distilled, edkm
    """

    name: ClassVar[str] = "weights.quantize"
    Config: ClassVar[type[WeightsConfig]] = WeightsConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"float_weights"}),
        after=frozenset({"weight_zeros"}),
        provides=frozenset({"weight_bits"}),
    )
    region_kind: ClassVar[str] = "linear layer"
    presets: ClassVar[Mapping[str, Preset]] = PRESETS

    def needs_calibration(self, config: WeightsConfig) -> bool:
        return config.bits == "mixed" or (config.bits is not None and _reads_data(config))

    def calibrate(
        self,
        graph_module: fx.GraphModule,
        regions: Sequence[WeightRegion | ExpertsRegion],
        config: WeightsConfig,
        data: CalibrationData,
        progress: Progress,
    ) -> Calibration:
        weights = [region for region in regions if isinstance(region, WeightRegion)]
        chosen = None
        if config.bits == "mixed":
            chosen = choose_bits(graph_module, weights, config, data, progress)
            bits = {name: int(found["bits"]) for name, found in chosen.statistics.items()}
        else:
            bits = dict.fromkeys((region.region for region in weights), config.bits or 8)
        if not _reads_data(config):
            assert chosen is not None
            return chosen
        recipe = Recipe(
            bits=bits,
            block=config.block_size,
            zero_point=config.zero_point,
            method=config.method,
            clip=config.clip,
            spread_errors=config.spread_errors,
            scale_inputs=config.scale_inputs,
            exponent=config.scale_exponent,
            shift_inputs=config.shift_inputs,
            int8_activations=_rounds_inputs(config),
        )
        codes = calibrate_codes(graph_module, weights, recipe, data, progress)
        return codes if chosen is None else joined(codes, chosen)

    def recovers(self, config: WeightsConfig) -> bool:
        return config.recover != "none" and config.bits is not None

    def recover(
        self,
        original: fx.GraphModule,
        graph_module: fx.GraphModule,
        config: WeightsConfig,
        data: CalibrationData,
        progress: Progress,
        emit: Emit,
    ) -> None:
        recipe = distil.Recipe(config.recover_steps, config.recover_learning_rate, "scales")
        distil.distil(original, graph_module, recipe, data, progress, emit)

    def identity(self) -> WeightsConfig:
        return WeightsConfig(bits=None)

    def budgets(self) -> tuple[WeightsConfig, WeightsConfig]:
        least = WeightsConfig(bits=3, block_size=256, method="kmeans", activations="float")
        most = WeightsConfig(bits=8, block_size=16, zero_point="float", method="hqq", activations="float")
        return least, most

    def changes_nothing(self, config: WeightsConfig, workload: Workload) -> str | None:
        del workload
        return "bits is none, so the weights would stay as they are" if config.bits is None else None

    def regions(self, graph_module: fx.GraphModule) -> Sequence[WeightRegion | ExpertsRegion]:
        return [*weight_regions(graph_module), *expert_regions(graph_module)]

    def selected(
        self, regions: Sequence[WeightRegion | ExpertsRegion], config: WeightsConfig
    ) -> Sequence[WeightRegion | ExpertsRegion]:
        chosen = [
            region
            for region in regions
            if (config.lm_head or region.kind != "head")
            and (config.embedding or region.kind != "embedding")
            and (config.experts or region.kind != "experts")
        ]
        if config.modules is None:
            return chosen
        for pattern in config.modules:
            if not any(_matches(pattern.removeprefix("!"), region) for region in regions):
                raise MemcompileError(
                    "MC301",
                    f"{self.name}.modules: {pattern!r} matches none of the {len(regions)} modules",
                    fix=f"they are called like {regions[0].region} and {regions[-1].region}"
                    if regions
                    else "the model has no linear layer",
                )
        wanted = [pattern for pattern in config.modules if not pattern.startswith("!")]
        unwanted = [pattern[1:] for pattern in config.modules if pattern.startswith("!")]
        return [
            region
            for region in chosen
            if (not wanted or any(_matches(pattern, region) for pattern in wanted))
            and not any(_matches(pattern, region) for pattern in unwanted)
        ]

    def check(
        self, region: WeightRegion | ExpertsRegion, config: WeightsConfig, context: Context = NO_CONTEXT
    ) -> WeightsFacts | Refusal:
        del context
        if config.bits is None:
            return self.refuse(region, "bits is none")
        if region.bits:
            return self.refuse(region, f"its weight is already quantised to {region.bits} bits")
        if region.stored is None:
            return self.refuse(region, "its weight is computed at run time")
        if isinstance(region, ExpertsRegion) and config.zero_point == "float":
            return self.refuse(region, "experts have no float zero points")
        if isinstance(region, ExpertsRegion) and config.method == "kmeans":
            return self.refuse(region, "experts have no tables of values")
        bits = 8 if config.bits == "mixed" else config.bits
        share = 1.0 if config.average_bits is None else config.average_bits / 8
        int8, chosen = _rounds_inputs(config), ""
        if config.activations == "int8" and not int8:
            chosen = "inputs stay floats: codes of a table cannot be multiplied as whole numbers"
        return WeightsFacts(bits, config.block_size, config.zero_point, config.method, int8, share, chosen)

    def rewrite(self, region: WeightRegion | ExpertsRegion, facts: WeightsFacts, emit: Emit) -> None:
        if isinstance(region, ExpertsRegion):
            quantize_experts(
                region,
                bits=facts.bits,
                block=facts.block,
                zero_point=facts.zero_point,
                # single experts see too little of a text to be calibrated on it
                method="hqq" if facts.method == "hqq" else "rtn",
                int8_activations=facts.int8_activations,
                emit=emit,
            )
            return
        node, weight = region.node, region.weight
        if facts.chosen and region.kind != "embedding":
            emit.decide(facts.chosen)
        if "bits" in emit.statistics:
            facts = replace(facts, bits=int(emit.statistics["bits"]))
            emit.decide(
                f"{facts.bits} bits; predicted to lose {float(emit.statistics['loss']):.2g} nats a token"
            )
        stored = (*facts.format, str(weight.target))
        shared = _shared(emit.graph_module, stored)
        arguments = shared if shared is not None else _store(region, facts, emit)
        if region.kind == "embedding":
            made = emit.call(
                torch.ops.memcompile.quantized_embedding.default,
                node.args[1], *arguments, facts.bits, region.width, node.meta["val"].dtype,
                before=node,
            )  # fmt: skip
        else:
            source, bias = operands(node)
            x = prepared_input(source, emit.statistics, emit, node)
            if "bias" in emit.statistics:
                moved = emit.statistics["bias"].to(node.meta["val"].dtype)
                bias = emit.buffer(f"{region.region}_bias", moved, before=node)
            made = emit.call(
                torch.ops.memcompile.quantized_linear.default,
                x, *arguments, bias, facts.bits, facts.int8_activations,
                before=node,
            )  # fmt: skip
        emit.mark(made, "weight_region", region.region)
        emit.mark(made, "quantized_from", stored)
        emit.replace_uses(node, made)
        emit.erase(node)
        if not weight.users:
            emit.erase(weight)
        if region.kind != "embedding":
            drop_input(source, emit)

    def cost(self, region: WeightRegion | ExpertsRegion, facts: WeightsFacts, workload: Workload) -> Cost:
        kind = {
            "zero_points": facts.zero_point == "integer",
            "offsets": facts.zero_point == "float",
            "table": facts.method == "kmeans",
        }
        if isinstance(region, ExpertsRegion):
            index, codes = argument(region.node, "index").meta["val"], facts.zero_point == "integer"
            experts = int(argument(region.node, "gate_up").meta["val"].shape[0])
            full = quantized_experts_cost(
                N=workload.batch, K=int(index.shape[1]), E=experts, M=region.width,
                F=region.rows // (3 * experts), block=facts.block, bits=facts.bits, zero_points=codes,
            )  # fmt: skip
        elif region.kind == "embedding":
            full = quantized_embedding_cost(
                tokens=workload.batch, K=region.width, block=facts.block, bits=facts.bits, **kind
            )
        else:
            full = quantized_linear_cost(
                tokens=workload.batch,
                K=region.width,
                N=region.rows,
                block=facts.block,
                bits=facts.bits,
                **kind,
            )
        return replace(full, bytes_moved=int(full.bytes_moved * facts.share))


def _reads_data(config: WeightsConfig) -> bool:
    """Whether calibration text decides about the codes themselves."""
    scaled = config.scale_inputs != "none" or config.shift_inputs
    of_tables = config.weigh_inputs or config.spread_errors
    return config.method in ("clip", "gptq") or of_tables or scaled


def _rounds_inputs(config: WeightsConfig) -> bool:
    """Whether products round their inputs to int8: entries of a table are floats."""
    return config.activations == "int8" and config.method != "kmeans"


def _matches(pattern: str, region: WeightRegion | ExpertsRegion) -> bool:
    """Whether a glob matches the region's name, or the path of a module around it."""
    parts = region.region.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _shared(graph_module: fx.GraphModule, stored: tuple[object, ...]) -> tuple[Any, ...] | None:
    """The codes of a weight that another region stored before: a tied head and embedding keep one copy."""
    for node in graph_module.graph.nodes:
        if node.meta.get("quantized_from") == stored:
            return tuple(node.args[1:6])
    return None


def _store(region: WeightRegion, facts: WeightsFacts, emit: Emit) -> tuple[fx.Node | None, ...]:
    weight = region.stored
    assert weight is not None
    found = calibrated_weight(emit.statistics, facts.bits, region.width)
    if found is None:
        # an embedding multiplies nothing, so that there is no data for it
        found = quantize_without_data(
            weight, bits=facts.bits, block=facts.block, zero_point=facts.zero_point, method=facts.method
        )
    return store_buffers(found, region, emit)


def store_buffers(found: QuantizedWeight, region: WeightRegion, emit: Emit) -> tuple[fx.Node | None, ...]:
    """The nodes that read codes, scales, zero points, offsets and table; None for what the format lacks."""
    return tuple(
        None if tensor is None else emit.buffer(f"{region.region}_{name}", tensor, before=region.node)
        for name, tensor in found.operands().items()
    )
