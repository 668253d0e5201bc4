"""`attention.sparse`: which keys a head looks at is chosen while a prompt is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

import torch
from pydantic import Field, field_validator
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData, collect
from memcompile.dialect import Cost
from memcompile.dialect.pages import page_bounds_cost
from memcompile.dialect.selection import Kind, covers
from memcompile.errors import MemcompileError
from memcompile.passes.attention.search import SearchPatterns
from memcompile.progress import Progress
from memcompile.regions import AttentionRegion, Refusal, Runtime, argument
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.fingerprint import graph_text
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset
from memcompile.rewrite.selectors import Site, parse_layers

UNLIMITED: Final = 2**30
# where nothing is measured: every preset was ahead at 4,000 tokens (docs/results/long-prompt.md)
DENSE_TOKENS: Final = 2048
# enough to see which diagonals and columns matter, little enough to be searched in a minute
SEARCH_TOKENS: Final = 4096
Selector = Literal["shape", "blocks", "antidiagonal", "vertical_slash", "searched", "pages"]


class SparseConfig(PassConfig):
    """How keys are chosen, how many, and from which prompt length on. Each selector reads its own keys."""

    selector: Selector = Field(default="blocks", description="the rule that chooses")
    block_tokens: Literal[32, 64, 128] = Field(default=64, description="keys and queries of a block")
    dense_tokens: int | None = Field(
        default=None,
        ge=0,
        le=UNLIMITED,
        description="up to so many tokens everything is looked at: below, choosing costs more than it saves; "
        "none: measured while optimising for ONNX Runtime, 2,048 elsewhere",
    )
    first_tokens: int = Field(default=100, ge=0, le=UNLIMITED, description="shape, blocks: always looked at")
    local_tokens: int = Field(
        default=800, ge=0, le=UNLIMITED, description="shape, blocks: before a query, always looked at"
    )
    tail_tokens: int = Field(
        default=0, ge=0, le=UNLIMITED, description="shape: last queries of a chunk that look at everything"
    )
    keep_tokens: int = Field(
        default=6400,
        ge=1,
        le=UNLIMITED,
        description="blocks: keys a block of queries looks at; pages: keys a decoded token looks at",
    )
    page_tokens: Literal[16, 32, 64] = Field(default=16, description="pages: keys that share their bounds")
    full_layers: str | None = Field(
        default=None, description='layers that look at everything, written as in `layers`: "0-1"'
    )
    stride_tokens: Literal[4, 8, 16, 32] = Field(default=8, description="antidiagonal: side of a cell")
    keep_mass: float = Field(
        default=0.9, gt=0.0, le=1.0, description="antidiagonal, searched: share of attention to keep"
    )
    columns: int = Field(default=1000, ge=0, le=UNLIMITED, description="vertical_slash: single keys")
    diagonals: int = Field(default=6096, ge=0, le=UNLIMITED, description="vertical_slash: distances")

    @field_validator("full_layers")
    @classmethod
    def _is_a_selector(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_layers(value)
            except MemcompileError as error:
                raise ValueError(error.message) from error
        return value

    @property
    def dense(self) -> int:
        """Tokens up to which everything is looked at, unless they are measured."""
        return DENSE_TOKENS if self.dense_tokens is None else self.dense_tokens

    @property
    def keep_pages(self) -> int:
        """Whole pages that `keep_tokens` come to."""
        return -(-self.keep_tokens // self.page_tokens)

    def pattern(self) -> tuple[int, int, int, int] | None:
        """The pattern of every head (memcompile/dialect/selection.py); None: it is searched, head by head,
        or nothing is chosen while a prompt is read."""
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
    """The pattern of all heads, None when each has its own from calibration, and its block and threshold.

    page_tokens, page_keep: of a decoded token's choice; 0: it looks at everything. measured: a backend that
    can measure where choosing begins to be faster does so.
    """

    pattern: tuple[int, int, int, int] | None
    block_tokens: int
    dense_tokens: int
    page_tokens: int = 0
    page_keep: int = 0
    measured: bool = False


class SparseAttention(Pass[AttentionRegion, SparseConfig, SparseFacts]):
    """Let each head look only at the keys that matter: while a prompt is read, or for every decoded token.

    Rewrites:  causal attention regions. All selectors but `pages`: calls with more than 16 queries and more
               than `dense_tokens` keys; the rule runs once a call (a chunk of the prompt, 2,048 tokens), for
               every query head. `pages`: calls of one token over more than `dense_tokens` keys; the rule runs
               for every token and key/value head. Both may stand in one plan.
    Needs:     a mask that is proven causal; for `searched`, calibration text; for `pages`, a whole cache.
    Refuses:   masks computed at run time, attention that is not causal, regions that already choose; for
               `pages`, windowed and evicted caches.
    Loses:     what the chosen keys do not show: while reading, or (`pages`) while decoding. The cache stays
               whole.
    Costs:     choosing: one pass over the keys for each block of queries, in means (blocks), cells of
               `stride_tokens` (antidiagonal) or the chunk's last 64 queries (vertical_slash). Saves the
               attention to what is not chosen, with kernels that skip it. `pages` keeps two rows of
               bounds for each page of keys, 1/page_tokens of the cache, and reads them for every token.
               ONNX Runtime without the kernel library looks at everything; so do ONNX Runtime on CUDA and
               TVM while decoding.
    Identity:  dense_tokens at least prompt and new tokens together.
    Presets:   a_shape, tri_shape, block_topk, xattention, minference, quest
    """

    name: ClassVar[str] = "attention.sparse"
    Config: ClassVar[type[SparseConfig]] = SparseConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"float_cache"}),
        after=frozenset({"kept_heads", "visibility"}),
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
        "quest": Preset(
            {"selector": "pages", "page_tokens": 16, "keep_tokens": 1024, "full_layers": "0-1"},
            "Tang et al. 2024, Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, "
            "arXiv:2406.10774",
            "A decoded token looks at the 64 pages of 16 keys whose bounds allow the largest products with "
            "it, and always at the newest page; the first two layers look at everything. The original "
            "chooses for every query head; here the query heads of a group share what the largest bound of "
            "any of them chooses.",
        ),
    }

    def identity(self) -> SparseConfig:
        return SparseConfig(dense_tokens=UNLIMITED)

    def budgets(self) -> tuple[SparseConfig, SparseConfig]:
        least = SparseConfig(
            selector="shape", block_tokens=32, dense_tokens=0, first_tokens=1, local_tokens=1
        )
        return least, SparseConfig(selector="shape", dense_tokens=0, local_tokens=UNLIMITED)

    def layers(self, config: SparseConfig, sites: Sequence[Site]) -> frozenset[int]:
        every = frozenset(site.layer for site in sites)
        return (
            every if config.full_layers is None else every - parse_layers(config.full_layers).resolve(sites)
        )

    def claim(self, config: SparseConfig) -> str:
        return "decode" if config.selector == "pages" else "prompt"

    def changes_nothing(self, config: SparseConfig, workload: Workload) -> str | None:
        total = workload.prompt_tokens + workload.new_tokens
        if config.dense >= total:
            return (
                f"dense_tokens is {config.dense}, and the workload has {total} tokens, so everything "
                "is looked at"
            )
        if config.selector == "pages" and config.keep_tokens >= total:
            return f"keep_tokens is {config.keep_tokens}, and the workload has {total} tokens"
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
        if config.selector == "pages":
            return self._check_pages(region, config)
        if argument(region.node, "pattern") is not None:
            return self.refuse(region, "it already chooses its keys while a prompt is read")
        measured = config.dense_tokens is None
        return SparseFacts(config.pattern(), config.block_tokens, config.dense, measured=measured)

    def _check_pages(self, region: AttentionRegion, config: SparseConfig) -> SparseFacts | Refusal:
        if region.page_tokens:
            return self.refuse(region, "it already chooses its keys for every decoded token")
        if region.window_tokens is not None:
            return self.refuse(region, f"its cache holds only a window of {region.window_tokens} tokens")
        if region.evict is not None:
            return self.refuse(region, "its cache is evicted after prefill, and pages are of a whole cache")
        measured = config.dense_tokens is None
        return SparseFacts(None, 0, config.dense, config.page_tokens, config.keep_pages, measured)

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
        if facts.measured:
            emit.mark(region.node, "measure_page_from" if facts.page_tokens else "measure_pattern_from", True)
        if facts.page_tokens:
            emit.update(
                region.node,
                page_tokens=facts.page_tokens,
                page_keep=facts.page_keep,
                page_from=facts.dense_tokens,
            )
            return
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
        whole = decode_cost(region, workload)
        total = workload.prompt_tokens + workload.new_tokens
        if not facts.page_tokens:
            return whole
        bounds = page_bounds_cost(
            B=workload.batch,
            S=total,
            G=region.kv_heads,
            D=region.head_dim,
            page_tokens=facts.page_tokens,
            element_bytes=argument(region.node, "k").meta["val"].element_size(),
        )
        if total <= facts.dense_tokens:
            return replace(whole, state_bytes=whole.state_bytes + bounds.state_bytes)
        read = decode_cost(region, workload, held_tokens=facts.page_keep * facts.page_tokens) + bounds
        return replace(read, state_bytes=whole.state_bytes + bounds.state_bytes)


def _one_long_window(data: CalibrationData) -> CalibrationData:
    """The windows' texts one after another: patterns show over long distances only."""
    texts = [window["input_ids"][:1] for window in data.windows if "input_ids" in window]
    if len(texts) != len(data.windows):
        return data
    joined = torch.cat(texts, dim=1)[:, :SEARCH_TOKENS]
    positions = torch.arange(joined.shape[1]).unsqueeze(0)
    return replace(data, windows=({"input_ids": joined, "position_ids": positions},))
