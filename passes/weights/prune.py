"""`weights.prune`: take weights, channels of feed-forward blocks, heads, or layers out of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.dialect import Cost
from memcompile.errors import MemcompileError
from memcompile.passes.weights import importance
from memcompile.passes.weights.distil import Recipe, distil
from memcompile.passes.weights.head_choice import heads_to_keep
from memcompile.passes.weights.heads import HeadsRegion, drop_heads, head_regions
from memcompile.passes.weights.structure import ChannelsRegion, LayerRegion, channel_regions, layer_regions
from memcompile.passes.weights.take_out import MARK, drop_channels, drop_layer
from memcompile.progress import Progress
from memcompile.regions import Refusal, WeightRegion, weight_regions
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset
from memcompile.weights.prune import mask_n_of_m, mask_of_blocks, mask_of_weights, unpack_mask

Granularity = Literal["weights", "n_of_m", "blocks", "channels", "heads", "layers"]
PrunedRegion = WeightRegion | ChannelsRegion | HeadsRegion | LayerRegion
# channels stay in multiples of this, where there are as many: blocks of codes are 32 wide
_MULTIPLE = 32


class PruneConfig(PassConfig):
    """What is taken out, how much of it, and by what score."""

    granularity: Granularity = Field(
        default="weights",
        description="single weights, all but n of m neighbours, square blocks (these become zeros), channels "
        "of feed-forward blocks, heads with their keys and values, or layers (these leave the model)",
    )
    sparsity: Annotated[float, Field(ge=0, le=0.99)] = Field(
        default=0.5,
        description="the share that goes; of n_of_m it is 1 - n/m, whatever is given here, unless 0; of "
        "heads and layers it is of all of them together",
    )
    n: Annotated[int, Field(ge=1, le=64)] = Field(default=2, description="granularity n_of_m: how many stay")
    m: Annotated[int, Field(ge=2, le=64)] = Field(default=4, description="granularity n_of_m: of how many")
    block_size: Literal[4, 8, 16, 32, 64] = Field(default=16, description="granularity blocks: their side")
    criterion: Literal["magnitude", "activation", "taylor"] = Field(
        default="magnitude",
        description="what stays: the largest weights; those that do most on calibration text (of layers, "
        "those that turn the stream most); or those without which the predictions move most, by gradients",
    )
    knee: bool = Field(
        default=False,
        description="granularity weights by magnitude: find the sparsity after which predictions on "
        "calibration text begin to break; `sparsity` is not read",
    )
    refit: bool = Field(
        default=False,
        description="granularity channels or heads: fit the product that reads them again, on calibration "
        "text",
    )
    lm_head: bool = Field(default=False, description="prune the product that gives the logits")
    recover: Literal["none", "distil"] = Field(
        default="none",
        description="train what is left on calibration text: distil, to give the predictions that the model "
        "of the plan gives before any pass",
    )
    recover_steps: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=100, description="recover: steps, each on one window of the text"
    )
    recover_learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=3e-4, description="recover: that of AdamW at the first step; it falls to 0 in a line"
    )
    recover_parameters: Literal["norms", "pruned", "all"] = Field(
        default="pruned",
        description="recover: train the weights of the norms, the tensors that were pruned, or every float "
        "weight but embedding and head; in memory they take 16 bytes a number",
    )

    @model_validator(mode="after")
    def _fits(self) -> PruneConfig:
        if self.n >= self.m:
            raise ValueError(f"n of m: n is {self.n} and m is {self.m}, so nothing would go")
        if self.knee and (self.granularity, self.criterion) != ("weights", "magnitude"):
            raise ValueError("knee: it is searched for granularity weights by criterion magnitude")
        if self.refit and self.granularity not in ("channels", "heads"):
            raise ValueError("refit: it is for granularity channels or heads")
        if self.granularity == "layers" and self.criterion != "activation":
            raise ValueError("granularity layers: its criterion is activation")
        if self.granularity == "heads" and self.criterion == "magnitude":
            raise ValueError("granularity heads: its criterion is activation or taylor")
        if self.granularity == "layers" and self.recover != "none" and self.recover_parameters == "pruned":
            raise ValueError("recover_parameters: of a layer that went nothing is left to train")
        return self


@dataclass(frozen=True, slots=True)
class PruneFacts:
    """What to do with one region. sparsity: of this region; layers: of all."""

    config: PruneConfig

    def mask(self, score: torch.Tensor) -> torch.Tensor:
        """The weights that stay, by a score [N,K]."""
        config = self.config
        if config.granularity == "n_of_m":
            return mask_n_of_m(score, config.n, config.m)
        if config.granularity == "blocks":
            return mask_of_blocks(score, config.sparsity, config.block_size)
        return mask_of_weights(score, config.sparsity, by_row=config.criterion == "activation")

    def channels(self, count: int) -> int:
        """How many of a block's channels stay."""
        kept = round(count * (1 - self.config.sparsity))
        if count >= 4 * _MULTIPLE:
            kept = max(1, round(kept / _MULTIPLE)) * _MULTIPLE
        return max(1, min(kept, count))


class PruneWeights(Pass[PrunedRegion, PruneConfig, PruneFacts]):
    """Set weights to zero, or take channels of feed-forward blocks, heads and layers out of the model.

    Rewrites:  the weights of linear layers (the head if asked for), feed-forward blocks, attention, or
               layers, by `granularity`; `layers` narrows it. Query heads that share keys and values go with
               them; where all share one, single query heads go and the cache stays. Layers may be left
               with different numbers of heads, at least one; later passes count those that stay.
    Needs:     calibration text for criteria activation and taylor, for `knee`, `refit` and `recover`; logits
               for taylor, knee and recover.
    Refuses:   weights that are computed at run time or already quantised, what was pruned before; heads that
               are normalised together, that something else reads, or whose way from and to the products
               around them is not understood; layers with one head.
    Loses:     what is taken out. A small model breaks early: look for the knee, recover, or set a gate.
    Costs:     zeros are stored and multiplied as other weights are: they save nothing by themselves, and stay
               zeros in codes without float zero points. Channels, heads and layers shrink file, memory and
               work; heads and layers also take their cache along. A step of recovery takes about as long as
               reading its window four times.
    Identity:  sparsity 0.
    Presets:   essential_sparsity, essential_2_4, wanda, wanda_2_4, lpvit, taylor_channels, taylor_heads,
               llm_pruner, shortgpt
    """

    name: ClassVar[str] = "weights.prune"
    Config: ClassVar[type[PruneConfig]] = PruneConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"float_weights"}), provides=frozenset({"weight_zeros", "kept_heads"})
    )
    region_kind: ClassVar[str] = "linear layer, feed-forward block, attention or layer"
    presets: ClassVar[Mapping[str, Preset]] = {
        "essential_sparsity": Preset(
            {"granularity": "weights", "criterion": "magnitude", "knee": True},
            "Jaiswal et al. 2023, The Emergence of Essential Sparsity, arXiv:2306.03805",
            "The smallest weights of each matrix go, as many as the predictions bear. The paper ranks all "
            "weights together, and reads the drop off a task's score.",
        ),
        "essential_2_4": Preset(
            {"granularity": "n_of_m", "n": 2, "m": 4, "criterion": "magnitude"},
            "Jaiswal et al. 2023, The Emergence of Essential Sparsity, arXiv:2306.03805",
            "Two of four neighbours stay, by magnitude.",
        ),
        "wanda": Preset(
            {"granularity": "weights", "sparsity": 0.5, "criterion": "activation"},
            "Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs, arXiv:2306.11695",
            "Half of each row goes, by magnitude times the norm of the input.",
        ),
        "wanda_2_4": Preset(
            {"granularity": "n_of_m", "n": 2, "m": 4, "criterion": "activation"},
            "Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs, arXiv:2306.11695",
            "Two of four neighbours stay, by magnitude times the norm of the input.",
        ),
        "lpvit": Preset(
            {"granularity": "blocks", "block_size": 16, "criterion": "taylor"},
            "Xu et al. 2024, LPViT, arXiv:2407.02068",
            "Square blocks go by the second-order Taylor term of the loss, here the Fisher diagonal; the "
            "paper's power model and its search over layers are left out.",
        ),
        "taylor_channels": Preset(
            {"granularity": "channels", "sparsity": 0.25, "criterion": "taylor", "refit": True},
            "Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, arXiv:1906.10771",
            "A quarter of the feed-forward channels goes by its Taylor term; the product that reads them is "
            "fitted again instead of being trained.",
        ),
        "taylor_heads": Preset(
            {"granularity": "heads", "sparsity": 0.1, "criterion": "taylor", "refit": True},
            "Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650",
            "A tenth of the heads goes by their Taylor term, here squared, by drawn tokens; the product that "
            "reads them is fitted again. The paper takes single heads, and divides by the norm of a layer's "
            "terms; here heads that share keys and values go together, and layers compare as they are.",
        ),
        "llm_pruner": Preset(
            {"granularity": "heads", "sparsity": 0.2, "criterion": "taylor", "recover": "distil"},
            "Ma et al. 2023, LLM-Pruner, arXiv:2305.11627",
            "A fifth of the heads goes in groups that depend on each other, by gradients, then a short "
            "training. The paper prunes channels with them, and trains low-rank additions on instructions; "
            "here the smaller products are trained to the predictions of the whole model. For channels add "
            "an entry with granularity channels.",
        ),
        "shortgpt": Preset(
            {"granularity": "layers", "sparsity": 0.1, "criterion": "activation"},
            "Men et al. 2024, ShortGPT, arXiv:2403.03853",
            "The layers that turn the residual stream least go.",
        ),
    }

    def identity(self) -> PruneConfig:
        return PruneConfig(sparsity=0.0)

    def budgets(self) -> tuple[PruneConfig, PruneConfig]:
        return PruneConfig(sparsity=0.99, lm_head=True), PruneConfig(sparsity=0.01)

    def changes_nothing(self, config: PruneConfig, workload: Workload) -> str | None:
        del workload
        return "sparsity is 0, so everything would stay" if _is_identity(config) else None

    def regions(self, graph_module: fx.GraphModule) -> Sequence[PrunedRegion]:
        weights = [region for region in weight_regions(graph_module) if region.kind != "embedding"]
        return [
            *weights,
            *channel_regions(graph_module),
            *head_regions(graph_module),
            *layer_regions(graph_module),
        ]

    def selected(self, regions: Sequence[PrunedRegion], config: PruneConfig) -> Sequence[PrunedRegion]:
        kinds: dict[str, type[Any]] = {
            "channels": ChannelsRegion,
            "heads": HeadsRegion,
            "layers": LayerRegion,
        }
        kind = kinds.get(config.granularity, WeightRegion)
        return [
            region
            for region in regions
            if isinstance(region, kind)
            and (config.lm_head or not isinstance(region, WeightRegion) or region.kind != "head")
        ]

    def check(
        self, region: PrunedRegion, config: PruneConfig, context: Context = NO_CONTEXT
    ) -> PruneFacts | Refusal:
        del context
        if _is_identity(config):
            return self.refuse(region, "sparsity is 0")
        if MARK in region.node.meta:
            return self.refuse(region, "it was pruned before")
        if isinstance(region, HeadsRegion) and region.reason:
            return self.refuse(region, region.reason)
        if isinstance(region, HeadsRegion) and region.attention.heads == 1:
            return self.refuse(region, "it has one head")
        members = _products(region)
        if quantized := [member for member in members if member.bits]:
            return self.refuse(region, f"its weight is already quantised to {quantized[0].bits} bits")
        if any(member.stored is None for member in members):
            return self.refuse(region, "its weight is computed at run time")
        return PruneFacts(config)

    def needs_calibration(self, config: PruneConfig) -> bool:
        by_data = config.criterion != "magnitude" or config.knee or config.refit
        return by_data and not _is_identity(config)

    def recovers(self, config: PruneConfig) -> bool:
        return config.recover != "none" and not _is_identity(config)

    def recover(
        self,
        original: fx.GraphModule,
        graph_module: fx.GraphModule,
        config: PruneConfig,
        data: CalibrationData,
        progress: Progress,
        emit: Emit,
    ) -> None:
        recipe = Recipe(config.recover_steps, config.recover_learning_rate, config.recover_parameters)
        distil(original, graph_module, recipe, data, progress, emit)

    def calibrate(
        self,
        graph_module: fx.GraphModule,
        regions: Sequence[PrunedRegion],
        config: PruneConfig,
        data: CalibrationData,
        progress: Progress,
    ) -> Calibration:
        facts = PruneFacts(config)
        measured = config.model_dump(exclude={key for key in PruneConfig.model_fields if "recover" in key})
        settings = (measured, [region.region for region in regions])

        def measure() -> Mapping[str, torch.Tensor]:
            weights = [region for region in regions if isinstance(region, WeightRegion)]
            if config.knee:
                return importance.essential_sparsity(graph_module, weights, _by_magnitude, data, progress)
            if config.granularity == "channels":
                return importance.channels_to_keep(
                    graph_module,
                    [region for region in regions if isinstance(region, ChannelsRegion)],
                    facts.channels,
                    criterion=config.criterion,
                    refit=config.refit,
                    data=data,
                    progress=progress,
                )
            if config.granularity == "heads":
                return heads_to_keep(
                    graph_module,
                    [region for region in regions if isinstance(region, HeadsRegion)],
                    config.sparsity,
                    criterion=config.criterion,
                    refit=config.refit,
                    data=data,
                    progress=progress,
                )
            if config.granularity == "layers":
                layers = [region for region in regions if isinstance(region, LayerRegion)]
                found = importance.influence_of_layers(graph_module, layers, data, progress)
                return _with_verdicts(found, config.sparsity)
            if config.criterion == "taylor":
                return importance.masks_by_gradients(graph_module, weights, facts.mask, data, progress)
            return importance.masks_by_inputs(graph_module, weights, facts.mask, data, progress)

        return importance.remembered(graph_module, settings, data, measure)

    def rewrite(self, region: PrunedRegion, facts: PruneFacts, emit: Emit) -> None:
        if isinstance(region, LayerRegion):
            _drop_layer(region, emit)
        elif isinstance(region, ChannelsRegion):
            _drop_channels(region, facts, emit)
        elif isinstance(region, HeadsRegion):
            _drop_heads(region, emit)
        else:
            _zero_weights(region, facts, emit)

    def cost(self, region: PrunedRegion, facts: PruneFacts, workload: Workload) -> Cost:
        tokens, total = workload.batch, Cost()
        share = 1.0
        if isinstance(region, ChannelsRegion):
            share = facts.channels(region.channels) / region.channels
        elif isinstance(region, HeadsRegion | LayerRegion):
            share = 1 - facts.config.sparsity
        if isinstance(region, HeadsRegion):
            whole = decode_cost(region.attention, workload)
            stays = 1.0 if region.attention.kv_heads == 1 else share
            total = Cost(
                int(share * whole.flops), int(stays * whole.bytes_moved), int(stays * whole.state_bytes)
            )
        for member in _products(region):
            element = member.node.meta["val"].element_size()
            numbers = int(share * member.rows * member.width)
            moved = numbers + tokens * (member.rows + member.width)
            total = total + Cost(flops=2 * tokens * numbers, bytes_moved=moved * element)
        return total


def _is_identity(config: PruneConfig) -> bool:
    return config.sparsity == 0 and not config.knee


def _products(region: PrunedRegion) -> tuple[WeightRegion, ...]:
    if isinstance(region, WeightRegion):
        return (region,)
    return (*region.makers, region.down) if isinstance(region, ChannelsRegion) else region.products


def _by_magnitude(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    return weight * mask_of_weights(weight.float().abs(), sparsity, by_row=False)


def _with_verdicts(found: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Which layers go: those with the least influence."""
    dropped = round(sparsity * len(found))
    if not dropped:
        raise MemcompileError(
            "MC305",
            f"weights.prune: sparsity {sparsity} of {len(found)} layers is none",
            fix="raise sparsity, or name more layers",
        )
    least = sorted(found, key=lambda name: float(found[name]))[:dropped]
    verdicts = {name.replace("/influence", "/dropped"): torch.tensor(name in least) for name in found}
    return {**found, **verdicts}


def _zero_weights(region: WeightRegion, facts: PruneFacts, emit: Emit) -> None:
    weight = region.stored
    assert weight is not None
    config = facts.config
    if "sparsity" in emit.statistics:
        config = _at_sparsity(config, float(emit.statistics["sparsity"]))
        emit.decide(f"sparsity {config.sparsity:.2f}: the knee")
    if "mask" in emit.statistics:
        keep = unpack_mask(emit.statistics["mask"], region.width)
    else:
        keep = replace(facts, config=config).mask(weight.float().abs())
    pruned = weight * keep
    stored = emit.buffer(
        f"{region.region}_pruned",
        (pruned.t() if region.transposed else pruned).contiguous(),
        before=region.node,
    )
    _point_at(region.node, region.weight, stored, emit)
    emit.mark(region.node, MARK, config.granularity)


def _at_sparsity(config: PruneConfig, sparsity: float) -> PruneConfig:
    """The config at another sparsity, the knee having been found."""
    return config.model_copy(update={"sparsity": sparsity, "knee": False})


def _point_at(node: fx.Node, old: fx.Node, new: fx.Node, emit: Emit) -> None:
    """Let a product read another weight, and drop the one that nobody reads any more."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    emit.update(node, **{names[node.args.index(old)]: new})
    if not old.users:
        emit.erase(old)


def _drop_channels(region: ChannelsRegion, facts: PruneFacts, emit: Emit) -> None:
    down = region.down.stored
    assert down is not None
    keep, fitted = emit.statistics.get("keep"), emit.statistics.get("down")
    if keep is None or fitted is None:
        score = importance.magnitude_of_channels(region)
        keep = score.topk(facts.channels(region.channels)).indices.sort().values
        fitted = down[:, keep]
    drop_channels(region, keep, fitted.to(down.dtype), emit)


def _drop_heads(region: HeadsRegion, emit: Emit) -> None:
    queries = emit.statistics["queries"].tolist()
    if len(queries) == region.attention.heads:
        emit.mark(region.node, MARK, "kept whole")
        return
    drop_heads(region, queries, emit.statistics.get("out"), emit)


def _drop_layer(region: LayerRegion, emit: Emit) -> None:
    influence = float(emit.statistics["influence"])
    if not bool(emit.statistics["dropped"]):
        emit.mark(region.node, MARK, f"kept at influence {influence:.3g}")
        return
    emit.decide(f"taken out; its influence was {influence:.3g}")
    drop_layer(region, emit)
