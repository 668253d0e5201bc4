"""What must hold of a graph after every pass."""

from __future__ import annotations

from torch import fx

from memcompile.errors import MemcompileError
from memcompile.regions import AttentionRegion, EvictSpec, argument, attention_regions


def verify(graph_module: fx.GraphModule, after: str) -> None:
    """Check the graph; `after` names the pass that ran last.

    Raises:
        MemcompileError: MC901, the graph breaks a rule.
    """

    def broken(rule: str, node: fx.Node | None = None) -> MemcompileError:
        return MemcompileError(
            "MC901", f"after {after}: {rule}", where=node.name if node is not None else None
        )

    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise broken(f"the graph does not hold together: {error}") from error
    graph_module.recompile()
    regions = attention_regions(graph_module)
    names: set[str] = set()
    served: set[tuple[int, str, int]] = set()
    for region in regions:
        if region.region in names:
            raise broken(f"two regions are called {region.region!r}", region.node)
        names.add(region.region)
        for rule in _broken_rules(region):
            raise broken(rule, region.node)
        heads = {(region.layer, region.path, head) for head in region.kv_head_ids}
        if heads & served:
            raise broken(f"layer {region.layer} computes a head twice", region.node)
        served |= heads


def _broken_rules(region: AttentionRegion) -> list[str]:
    node = region.node
    scales = [argument(node, name) for name in ("k_scale", "v_scale")]
    rules = {
        "query heads are not a multiple of key/value heads": region.heads % region.kv_heads != 0,
        "the region has no name": not region.region,
        "sinks or strided blocks without a window": not region.window_tokens
        and bool(region.sinks or region.stride),
        "block and stride go together": bool(region.block) != bool(region.stride),
        "bits must be 0, 8 or 4": region.bits not in (0, 8, 4),
        "a quantised cache needs both scales": bool(region.bits) and None in scales,
        "head ids do not fit the heads": len(region.kv_head_ids) != region.kv_heads,
        "eviction of a windowed cache": region.evict is not None and region.window_tokens is not None,
        "evict is not an EvictSpec": region.evict is not None and not isinstance(region.evict, EvictSpec),
    }
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if isinstance(scale, fx.Node) and scale.meta["val"].numel() != region.kv_heads * region.head_dim:
            rules[f"{name} does not have one value a channel"] = True
    return [rule for rule, is_broken in rules.items() if is_broken]
