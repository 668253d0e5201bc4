"""`attention.sparse`: which keys a head looks at is chosen while a prompt is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

import torch
from pydantic import Field
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData, collect
from memcompile.dialect import Cost
from memcompile.dialect.selection import Kind, covers
from memcompile.passes.attention.search import SearchPatterns
from memcompile.progress import Progress
from memcompile.regions import AttentionRegion, Refusal, Runtime, argument
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.fingerprint import graph_text
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset

UNLIMITED: Final = 2**30
# enough to see which diagonals and columns matter, little enough to be searched in a minute
SEARCH_TOKENS: Final = 4096
Selector = Literal["shape", "blocks", "antidiagonal", "vertical_slash", "searched"]


class SparseConfig(PassConfig):
    """How keys are chosen, how many, and from which prompt length on. Each selector reads its own keys."""

    selector: Selector = Field(default="blocks", description="the rule that chooses")
    block_tokens: Literal[32, 64, 128] = Field(default=64, description="keys and queries of a block")
    dense_tokens: int = Field(
        default=2048,
        ge=0,
        le=UNLIMITED,
        description="up to so many tokens everything is looked at: below, choosing costs more than it saves",
    )
    first_tokens: int = Field(default=100, ge=0, le=UNLIMITED, description="shape, blocks: always looked at")
    local_tokens: int = Field(
        default=800, ge=0, le=UNLIMITED, description="shape, blocks: before a query, always looked at"
    )
    tail_tokens: int = Field(
        default=0, ge=0, le=UNLIMITED, description="shape: last queries of a chunk that look at everything"
    )
    keep_tokens: int = Field(
        default=6400, ge=1, le=UNLIMITED, description="blocks: keys a block of queries looks at"
    )
    stride_tokens: Literal[4, 8, 16, 32] = Field(default=8, description="antidiagonal: side of a cell")
    keep_mass: float = Field(
        default=0.9, gt=0.0, le=1.0, description="antidiagonal, searched: share of attention to keep"
    )
    columns: int = Field(default=1000, ge=0, le=UNLIMITED, description="vertical_slash: single keys")
    diagonals: int = Field(default=6096, ge=0, le=UNLIMITED, description="vertical_slash: distances")

    def pattern(self) -> tuple[int, int, int, int] | None:
        """The pattern of every head (memcompile/dialect/selection.py); None: it is searched, head by head."""
        blocks = {name: -(-getattr(self, name) // self.block_tokens) for name in _IN_TOKENS}
        return {
            "shape": (Kind.SHAPE, self.first_tokens, self.local_tokens, self.tail_tokens),
            "blocks": (Kind.BLOCKS, blocks["keep_tokens"], blocks["first_tokens"], blocks["local_tokens"]),
            "antidiagonal": (Kind.ANTIDIAGONAL, self.stride_tokens, round(self.keep_mass * 1e6), 0),
            "vertical_slash": (Kind.VERTICAL_SLASH, self.columns, self.diagonals, 0),
        }.get(self.selector)


_IN_TOKENS: Final = ("keep_tokens", "first_tokens", "local_tokens")


@dataclass(frozen=True, slots=True)
class SparseFacts:
    """The pattern of all heads, None when each has its own from calibration, and its block and threshold."""

    pattern: tuple[int, int, int, int] | None
    block_tokens: int
    dense_tokens: int


class SparseAttention(Pass[AttentionRegion, SparseConfig, SparseFacts]):
    """Let each head look only at the keys that matter while a prompt is read.

    Rewrites:  causal attention regions: calls with more than 16 queries and more than `dense_tokens` keys.
               The rule runs once a call (a chunk of the prompt, 2,048 tokens), for every query head.
    Needs:     a mask that is proven causal; for `searched`, calibration text.
    Refuses:   masks computed at run time, attention that is not causal, regions that already choose.
    Loses:     what the chosen keys do not show, while reading; the cache stays whole, and decoding looks at
               all of it.
    Costs:     choosing: one pass over the keys for each block of queries, in means (blocks), cells of
               `stride_tokens` (antidiagonal) or the chunk's last 64 queries (vertical_slash). Saves the
               attention to what is not chosen, with kernels that skip it. ONNX Runtime without the kernel
               library looks at everything.
    Identity:  dense_tokens at least prompt and new tokens together.
    Presets:   a_shape, tri_shape, block_topk, xattention, minference
    """

    name: ClassVar[str] = "attention.sparse"
    Config: ClassVar[type[SparseConfig]] = SparseConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"float_cache"}),
        after=frozenset({"visibility"}),
        provides=frozenset({"prompt_choice"}),
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "a_shape": Preset(
            {"selector": "shape", "first_tokens": 100, "local_tokens": 800},
            "Jiang et al. 2024, MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic "
            "Sparse Attention, arXiv:2407.02490",
            "The first and the last tokens, rounded up to whole blocks; the values of the method's search.",
        ),
        "tri_shape": Preset(
            {"selector": "shape", "first_tokens": 100, "local_tokens": 800, "tail_tokens": 128},
            "Li et al. 2024, SCBench: A KV Cache-Centric Analysis of Long-Context Methods, arXiv:2412.10319",
            "The same, and the last queries of every chunk look at everything. The original does so for the "
            "prompt's last queries only.",
        ),
        "block_topk": Preset(
            {"selector": "blocks", "keep_tokens": 6400, "first_tokens": 0, "local_tokens": 0},
            "Jiang et al. 2024, MInference 1.0 (its block-sparse pattern), arXiv:2407.02490",
            "The 100 blocks of 64 keys whose mean fits the mean query best.",
        ),
        "xattention": Preset(
            {"selector": "antidiagonal", "block_tokens": 128, "stride_tokens": 8, "keep_mass": 0.9},
            "Xu et al. 2025, XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv:2503.16428",
            "Blocks by the sums along the antidiagonals of cells, the largest first, up to nine tenths of "
            "the mass.",
        ),
        "minference": Preset(
            {"selector": "searched", "keep_mass": 0.95},
            "Jiang et al. 2024, MInference 1.0, arXiv:2407.02490",
            "For every head the cheapest of a shape, columns with diagonals, or blocks that keeps 95% of its "
            "attention on calibration text. The original fixes the cost and takes the pattern that keeps "
            "most; diagonals are rounded up to blocks here.",
        ),
    }

    def identity(self) -> SparseConfig:
        return SparseConfig(dense_tokens=UNLIMITED)

    def budgets(self) -> tuple[SparseConfig, SparseConfig]:
        least = SparseConfig(
            selector="shape", block_tokens=32, dense_tokens=0, first_tokens=1, local_tokens=1
        )
        return least, SparseConfig(selector="shape", dense_tokens=0, local_tokens=UNLIMITED)

    def changes_nothing(self, config: SparseConfig, workload: Workload) -> str | None:
        total = workload.prompt_tokens + workload.new_tokens
        if config.dense_tokens >= total:
            return (
                f"dense_tokens is {config.dense_tokens}, and the workload has {total} tokens, so everything "
                "is looked at"
            )
        pattern = config.pattern()
        if pattern is None or not covers(pattern[0], list(pattern[1:]), total, config.block_tokens):
            return None
        return f"the budget of selector {config.selector} covers all {total} tokens of the workload"

    def check(
        self, region: AttentionRegion, config: SparseConfig, context: Context = NO_CONTEXT
    ) -> SparseFacts | Refusal:
        del context
        if isinstance(region.mask, Runtime):
            return self.refuse(
                region, "its mask is computed at run time, so nothing is proven about who sees whom"
            )
        if not argument(region.node, "causal"):
            return self.refuse(region, f"its mask is {region.mask.kind}, and a prompt is read causally")
        if argument(region.node, "pattern") is not None:
            return self.refuse(region, "it already chooses its keys while a prompt is read")
        return SparseFacts(config.pattern(), config.block_tokens, config.dense_tokens)

    def needs_calibration(self, config: SparseConfig) -> bool:
        return config.selector == "searched"

    def calibrate(
        self,
        graph_module: fx.GraphModule,
        regions: Sequence[AttentionRegion],
        config: SparseConfig,
        data: CalibrationData,
        progress: Progress,
    ) -> Calibration:
        return collect(
            graph_module,
            [region.region for region in regions],
            SearchPatterns(config.block_tokens, config.keep_mass),
            _one_long_window(data),
            graph_key=graph_text(graph_module),
            progress=progress,
        )

    def rewrite(self, region: AttentionRegion, facts: SparseFacts, emit: Emit) -> None:
        if facts.pattern is None:
            pattern = emit.statistics["pattern"].to(torch.int32)
            kinds = [Kind(kind).name.lower() for kind in pattern[:, 0].tolist()]
            counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
            emit.decide(", ".join(f"{count} heads {kind}" for kind, count in counts.items()))
        else:
            pattern = torch.tensor([facts.pattern] * region.heads, dtype=torch.int32)
        stored = emit.buffer(f"attention_{region.region}_pattern", pattern, before=region.node)
        emit.update(
            region.node, pattern=stored, pattern_block=facts.block_tokens, pattern_from=facts.dense_tokens
        )

    def cost(self, region: AttentionRegion, facts: SparseFacts, workload: Workload) -> Cost:
        return decode_cost(region, workload)


def _one_long_window(data: CalibrationData) -> CalibrationData:
    """The windows' texts one after another: patterns show over long distances only."""
    texts = [window["input_ids"][:1] for window in data.windows if "input_ids" in window]
    if len(texts) != len(data.windows):
        return data
    joined = torch.cat(texts, dim=1)[:, :SEARCH_TOKENS]
    positions = torch.arange(joined.shape[1]).unsqueeze(0)
    return replace(data, windows=({"input_ids": joined, "position_ids": positions},))
