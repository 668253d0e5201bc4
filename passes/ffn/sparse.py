"""`ffn.sparse`: a decoded token computes some neurons of each feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import fx

from memcompile.dialect import Cost
from memcompile.dialect.ffn import neuron_counts_cost, sparse_ffn_cost
from memcompile.regions import FfnRegion, Refusal, ffn_regions
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset


class FfnConfig(PassConfig):
    """How many neurons a decoded token computes, and when they are chosen."""

    keep_fraction: float = Field(default=0.5, gt=0.0, le=1.0, description="share of a layer's neurons")
    when: Literal["token", "prefill"] = Field(
        default="token",
        description="token: for every token, the most active ones, after all gates were computed; prefill: "
        "once, those that were among the most active for most tokens of the prompt",
    )
    token_fraction: float = Field(
        default=0.4,
        gt=0.0,
        le=1.0,
        description="prefill: share of the neurons that count as the most active of one token",
    )


@dataclass(frozen=True, slots=True)
class FfnFacts:
    """Neurons that are kept, and those that count for a token; `token_keep` 0: chosen for every token."""

    keep: int
    token_keep: int


class SparseFfn(Pass[FfnRegion, FfnConfig, FfnFacts]):
    """Let a decoded token compute only some neurons of each feed-forward layer.

    Rewrites:  gated feed-forward layers, down(act(gate(x)) * up(x)): calls of one token after a prompt. A
               prompt is read with every neuron.
    Needs:     three stored float weights without biases, read by nothing else.
    Refuses:   layers whose weights are quantised, computed or have biases, and keep_fraction 1.
    Loses:     what the other neurons add. Models with SiLU or GELU gates have no neurons at rest: they lose
               more than the ReLU models that both papers are about. Gates show how much.
    Costs:     while decoding, of a layer's weights a third and keep_fraction of the rest are read (token), or
               keep_fraction of all (prefill), where reading weights is what decoding waits for. A prompt's
               every eighth token is counted (prefill). Rows of a batch choose alone, and share nothing. ONNX
               Runtime without the kernel library, or on CUDA, and TVM compute every neuron.
    Identity:  keep_fraction=1.
    Presets:   lazy_neuron, coreinfer
    """

    name: ClassVar[str] = "ffn.sparse"
    Config: ClassVar[type[FfnConfig]] = FfnConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(needs=frozenset({"float_weights"}), provides=frozenset({"neuron_choice"}))
    region_kind: ClassVar[str] = "gated feed-forward layer"
    presets: ClassVar[Mapping[str, Preset]] = {
        "lazy_neuron": Preset(
            {"when": "token", "keep_fraction": 0.5},
            "Li et al. 2022, The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in "
            "Transformers, arXiv:2210.06313",
            "The top-k of every token by activation. The paper trains ReLU models with it; the half that is "
            "kept is a default of this preset, for gated models as they are.",
        ),
        "coreinfer": Preset(
            {"when": "prefill", "keep_fraction": 0.5, "token_fraction": 0.4},
            "Wang et al. 2024, CoreInfer: Accelerating Large Language Model Inference with "
            "Semantics-Inspired Adaptive Sparse Activation, arXiv:2410.18311",
            "The neurons that are among the most active 40% for most tokens of the prompt, fixed while "
            "decoding. The half that is kept is a default of this preset.",
        ),
    }

    def identity(self) -> FfnConfig:
        return FfnConfig(keep_fraction=1.0)

    def budgets(self) -> tuple[FfnConfig, FfnConfig]:
        return FfnConfig(keep_fraction=0.01), FfnConfig(keep_fraction=0.99, when="prefill")

    def changes_nothing(self, config: FfnConfig, workload: Workload) -> str | None:
        del workload
        return "keep_fraction is 1, so every neuron is computed" if config.keep_fraction == 1.0 else None

    def regions(self, graph_module: fx.GraphModule) -> Sequence[FfnRegion]:
        return ffn_regions(graph_module)

    def check(
        self, region: FfnRegion, config: FfnConfig, context: Context = NO_CONTEXT
    ) -> FfnFacts | Refusal:
        del context
        if config.keep_fraction == 1.0:
            return self.refuse(region, "keep_fraction is 1")
        if region.keep:
            return self.refuse(region, f"it already computes {region.keep} of {region.neurons} neurons")
        if region.reason:
            return self.refuse(region, region.reason)
        keep = max(1, round(config.keep_fraction * region.neurons))
        counted = max(1, round(config.token_fraction * region.neurons))
        return FfnFacts(keep, counted if config.when == "prefill" else 0)

    def rewrite(self, region: FfnRegion, facts: FfnFacts, emit: Emit) -> None:
        node, (gate, up) = region.node, (region.gate, region.up)
        weight = region.down
        assert weight is not None
        stored: Any = emit.graph_module
        for part in str(weight.target).split("."):
            stored = getattr(stored, part)
        # a neuron's part of `down` has to lie in one piece
        down = emit.buffer(f"{region.region}_down", stored.detach().t().contiguous(), before=node)
        made = emit.call(
            torch.ops.memcompile.sparse_ffn.default,
            region.x, gate, up, down,
            before=node, activation=region.activation, keep=facts.keep,
        )  # fmt: skip
        emit.mark(made, "ffn_path", region.path)
        if facts.token_keep:
            emit.mark(made, "counted", facts.token_keep)
        emit.replace_uses(node, made)
        _erase(node, {region.x, gate, up}, emit)

    def cost(self, region: FfnRegion, facts: FfnFacts, workload: Workload) -> Cost:
        element = region.node.meta["val"].element_size()
        sizes = {"B": workload.batch, "M": region.width, "F": region.neurons, "K": facts.keep}
        cost = sparse_ffn_cost(**sizes, counted=bool(facts.token_keep), element_bytes=element)
        return cost + neuron_counts_cost(B=workload.batch, F=region.neurons) if facts.token_keep else cost


def _erase(node: fx.Node, kept: set[fx.Node | None], emit: Emit) -> None:
    """Remove a node and what only it needed, down to `kept`."""
    if node in kept or node.users:
        return
    inputs = node.all_input_nodes
    emit.erase(node)
    for source in inputs:
        _erase(source, kept, emit)
