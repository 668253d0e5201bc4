"""`kv.evict`: after prefill, keep the cached tokens that score highest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from pydantic import Field, model_validator

from memcompile.dialect import Cost
from memcompile.passes.kv.scores import KeyNorm, ObservedAttention, Recency
from memcompile.regions import AttentionRegion, EvictSpec, Refusal, Runtime, Scorer, argument
from memcompile.rewrite.costs import decode_cost
from memcompile.rewrite.emit import Emit
from memcompile.rewrite.entry import Workload
from memcompile.rewrite.pass_ import NO_CONTEXT, Context, Exactness, Order, Pass, PassConfig, Preset

MOST_TOKENS: Final = 2**30


class EvictConfig(PassConfig):
    """Score, budget and protection of cached tokens."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("keep_tokens", "keep_fraction"),)

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("keep_tokens", "keep_fraction"),)

    score: Literal["observed_attention", "recency", "key_norm"] = Field(
        default="observed_attention", description="what makes a token worth keeping"
    )
    keep_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MOST_TOKENS,
        description="tokens each key/value head keeps; this or keep_fraction",
    )
    keep_fraction: float | None = Field(
        default=None, gt=0.0, le=1.0, description="share of the prompt each key/value head keeps, rounded up"
    )
    observe_tokens: int = Field(
        default=32, ge=1, le=1024, description="last queries that vote, always kept (observed_attention only)"
    )
    pool: Literal["avg", "max"] = Field(
        default="avg", description="how a score spreads to neighbouring tokens (observed_attention only)"
    )
    pool_kernel: int = Field(
        default=7,
        ge=1,
        le=255,
        description="tokens pooled together, an odd number; 1: none (observed_attention only)",
    )
    group_reduce: Literal["mean", "max"] = Field(
        default="mean", description="how the query heads of a group agree (observed_attention only)"
    )
    sink_tokens: int = Field(default=0, ge=0, le=MOST_TOKENS, description="first tokens that are always kept")
    recent_tokens: int = Field(
        default=0, ge=0, le=MOST_TOKENS, description="last tokens that are always kept"
    )

    @property
    def observed(self) -> int:
        """Queries the scorer asks for."""
        return self.observe_tokens if self.score == "observed_attention" else 0

    @property
    def protected_recent(self) -> int:
        """Last tokens that are kept whatever they score."""
        return max(self.recent_tokens, self.observed)

    @model_validator(mode="after")
    def _is_consistent(self) -> EvictConfig:
        if (self.keep_tokens is None) == (self.keep_fraction is None):
            given = "neither" if self.keep_tokens is None else "both"
            raise ValueError(f"keep_tokens and keep_fraction: {given} given, exactly one is needed")
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel is {self.pool_kernel}, and must be odd to have a middle")
        protected = self.sink_tokens + self.protected_recent
        if self.keep_tokens is not None and self.keep_tokens < protected:
            raise ValueError(
                f"keep_tokens is {self.keep_tokens}, less than the {protected} tokens that are always kept "
                f"({self.sink_tokens} first and {self.protected_recent} last)"
            )
        return self


@dataclass(frozen=True, slots=True)
class EvictFacts:
    """The policy for one region."""

    spec: EvictSpec


class EvictTokens(Pass[AttentionRegion, EvictConfig, EvictFacts]):
    """Keep only the highest-scoring cached tokens of each key/value head once the prompt has been read.

    Rewrites:  the cache of a causal attention region, once, after prefill; decoding goes on with true
               positions and adds every new token.
    Needs:     a cache of the whole prompt; for observed_attention, the last `observe_tokens` queries.
    Refuses:   regions that see only a window (their cache already holds no more), masks computed at run
               time, attention that is not causal, caches that are already evicted or quantised.
    Loses:     the evicted tokens, for good: a question that comes after prefill cannot bring them back.
               With keep_fraction 0.25 three of four are gone.
    Costs:     one H×observe×S score matrix per layer when prefill ends; saves 2·(S−kept)·G·D elements per
               layer for the whole of decoding. Prefill itself is as before.
    Identity:  keep_fraction 1.0, or keep_tokens at least the prompt.
    Presets:   snapkv (Li et al. 2024), streaming (Xiao et al. 2023), knorm (Devoto et al. 2024)
    """

    name: ClassVar[str] = "kv.evict"
    Config: ClassVar[type[EvictConfig]] = EvictConfig
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    order: ClassVar[Order] = Order(
        needs=frozenset({"float_cache"}),
        after=frozenset({"kept_heads", "visibility"}),
        provides=frozenset({"kept_tokens"}),
        invalidates=frozenset({"whole_cache"}),
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "snapkv": Preset(
            {
                "score": "observed_attention",
                "observe_tokens": 32,
                "pool": "avg",
                "pool_kernel": 7,
                "group_reduce": "mean",
            },
            "Li et al. 2024, SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469",
            "The last 32 queries of the prompt vote for the keys they attend to; votes are pooled over 7 "
            "neighbouring tokens; the 32 tokens themselves are always kept. The paper pools with max or "
            "average and kernels of 5 to 7; here the mean over the window stands for its sum, which ranks "
            "the same, and the query heads of a group are averaged so that each key/value head keeps one "
            "set.",
        ),
        "streaming": Preset(
            {"score": "recency", "sink_tokens": 4},
            "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453",
            "Keeps the first 4 tokens and the last ones. Unlike attention.static, prefill sees everything "
            "and tokens that come later are all kept.",
        ),
        "knorm": Preset(
            {"score": "key_norm"},
            "Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, "
            "arXiv:2406.11430",
            "Keeps the keys with the smallest norm, whatever was asked. The paper's experiments leave the "
            "first "
            'two layers whole: add layers: "!0-1" for that.',
        ),
    }

    def identity(self) -> EvictConfig:
        return EvictConfig(keep_fraction=1.0)

    def budgets(self) -> tuple[EvictConfig, EvictConfig]:
        return EvictConfig(keep_tokens=1, observe_tokens=1), EvictConfig(keep_tokens=MOST_TOKENS)

    def changes_nothing(self, config: EvictConfig, workload: Workload) -> str | None:
        if config.keep_fraction == 1.0:
            return "keep_fraction is 1, so nothing would be evicted"
        if config.keep_tokens is None or config.keep_tokens < workload.prompt_tokens:
            return None
        return (
            f"keep_tokens is {config.keep_tokens} and the workload's prompt is {workload.prompt_tokens} "
            "tokens, so nothing would be evicted"
        )

    def check(
        self, region: AttentionRegion, config: EvictConfig, context: Context = NO_CONTEXT
    ) -> EvictFacts | Refusal:
        if isinstance(region.mask, Runtime):
            return self.refuse(
                region, "its mask is computed at run time, so nothing is proven about who sees whom"
            )
        if not argument(region.node, "causal"):
            return self.refuse(
                region, f"its mask is {region.mask.kind}: attention that is not causal has no cache"
            )
        if region.window_tokens is not None:
            return self.refuse(
                region, f"its cache already holds only the window of {region.window_tokens} tokens it can see"
            )
        if region.evict is not None:
            return self.refuse(region, f"its cache is already evicted, by {region.evict.scorer.name}")
        if region.page_tokens:
            return self.refuse(
                region, "its keys are chosen for every decoded token, by pages of a whole cache"
            )
        if region.bits:
            return self.refuse(region, f"its cache is already quantised to {region.bits} bits; evict first")
        facts = EvictFacts(self._spec(region, config))
        protected = config.sink_tokens + config.protected_recent
        prompt = context.workload.prompt_tokens if context.workload is not None else None
        if prompt is not None and facts.spec.kept(prompt) < min(protected, prompt):
            return self.refuse(
                region,
                f"keep_fraction {config.keep_fraction} of {prompt} prompt tokens is "
                f"{facts.spec.kept(prompt)}, less than the {protected} that are always kept",
            )
        return facts

    def _spec(self, region: AttentionRegion, config: EvictConfig) -> EvictSpec:
        return EvictSpec(
            scorer=_scorer(region, config),
            keep_tokens=config.keep_tokens,
            keep_fraction=config.keep_fraction,
            observe_tokens=config.observed,
            sink_tokens=config.sink_tokens,
            recent_tokens=config.protected_recent,
        )

    def rewrite(self, region: AttentionRegion, facts: EvictFacts, emit: Emit) -> None:
        emit.mark(region.node, "evict", facts.spec)

    def cost(self, region: AttentionRegion, facts: EvictFacts, workload: Workload) -> Cost:
        held = facts.spec.kept(workload.prompt_tokens) + workload.new_tokens
        return decode_cost(region, workload, held_tokens=held)


def _scorer(region: AttentionRegion, config: EvictConfig) -> Scorer:
    if config.score == "recency":
        return Recency()
    if config.score == "key_norm":
        return KeyNorm()
    return ObservedAttention(
        observe_tokens=config.observe_tokens,
        scale=float(argument(region.node, "scale")),
        softcap=region.softcap,
        pool=config.pool,
        pool_kernel=config.pool_kernel,
        group_reduce=config.group_reduce,
    )
