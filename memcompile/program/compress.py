"""The `compress` function of a program: after prefill, keep the chosen tokens of each evicted cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from memcompile.dialect.cache_codes import dequantize
from memcompile.program.program import PositionGroup, Program, StateSpec
from memcompile.regions import EvictSpec, argument, attention_regions

BEFORE_ALL = float("-inf")
MILLION = 1_000_000


def choose_tokens(
    scores: torch.Tensor, positions: torch.Tensor, group: PositionGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots to keep for each head, in the order of their positions, and how many are kept.

    scores [B,G,S]; positions int64 [B,S], -1 for an empty slot. Gives slots [B,G,K] and kept [B]; K is the
    most that S slots could keep, and entries past a row's own count stand for nothing.
    """
    spec = group.evict
    assert spec is not None
    slots = scores.shape[2]
    used = (positions >= 0).sum(dim=1)
    if spec.keep_tokens is not None:
        most = torch.sym_min(slots, spec.keep_tokens)  # type: ignore[no-untyped-call]
        kept = used.clamp(max=spec.keep_tokens)
    else:
        assert spec.keep_fraction is not None
        # ceil in integers per million: float rounding must not keep one token more or less
        share = round(spec.keep_fraction * MILLION)
        most = (slots * share + MILLION - 1) // MILLION
        kept = (used * share + MILLION - 1) // MILLION
    ranked = torch.topk(_keys(scores, positions, spec), most, dim=2).indices
    wide_positions = positions.unsqueeze(1).expand(-1, scores.shape[1], -1)
    rank = torch.arange(most, device=scores.device).reshape(1, 1, -1)
    inside = rank < kept.reshape(-1, 1, 1)
    # what is kept beyond a row's own count goes last, in any order
    place = torch.where(inside, torch.gather(wide_positions, 2, ranked), torch.iinfo(torch.int64).max)
    by_position = torch.topk(place, most, dim=2, largest=False).indices
    return torch.gather(ranked, 2, by_position), kept


def _keys(scores: torch.Tensor, positions: torch.Tensor, spec: EvictSpec) -> torch.Tensor:
    """Sort keys, float64 [B,G,S], without ties: protected tokens first, then by score; the newer wins a tie.

    No backend promises a stable sort. A float32 score has 29 spare bits in float64, which hold the position.
    """
    newest = positions.max(dim=1, keepdim=True).values
    protected = (positions < spec.sink_tokens) | (positions > newest - spec.recent_tokens)
    place = positions.unsqueeze(1).to(torch.float64)
    wide = scores.float().to(torch.float64)
    keys = wide + wide.abs() * place * 2.0**-50 + place * 1e-300
    valid = (positions >= 0).unsqueeze(1)
    best = torch.where(valid, keys, BEFORE_ALL).amax(dim=2, keepdim=True)
    keys = torch.where(protected.unsqueeze(1), best.abs() * 2.0 + 1.0 + place, keys)
    return torch.where(valid, keys, BEFORE_ALL)


class EvictState(torch.nn.Module):
    """Evict from the cache of one state.

    forward(positions [B,S], key, value [B,G,S,D], then observed queries if the policy asks for them, then
    k_scale and v_scale [G*D] if the cache is quantised) gives the new positions [B,K] (0..kept-1, then -1:
    every kept token stays visible), key and value.
    """

    def __init__(self, group: PositionGroup, state: StateSpec) -> None:
        super().__init__()
        self.group = group
        self.state = state

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec, state = self.group.evict, self.state
        assert spec is not None
        positions, key, value, *remaining = inputs
        observed = remaining.pop(0) if state.observe_tokens else None
        wide_key, wide_value = key, value
        if state.bits:
            k_scale, v_scale = remaining
            wide_key = dequantize(key, k_scale, state.bits, state.head_dim)
            wide_value = dequantize(value, v_scale, state.bits, state.head_dim)
        scores = spec.scorer(wide_key, wide_value, observed, positions)
        slots, kept = choose_tokens(scores, positions, self.group)
        index = slots.unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
        rank = torch.arange(slots.shape[2], device=positions.device).unsqueeze(0)
        new_positions = torch.where(rank < kept.unsqueeze(1), rank, -1)
        return new_positions, torch.gather(key, 2, index), torch.gather(value, 2, index)


@dataclass(frozen=True)
class Compress:
    """`compress` of a program: which caches are evicted, and the scales of those that are quantised.

    As a whole it takes, for each evicted group, the positions and then each state's key, value and, if it
    observes, observed queries; it gives the new positions and each state's key and value.
    """

    groups: tuple[tuple[PositionGroup, tuple[StateSpec, ...]], ...]
    scales: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def scales_of(self, state: StateSpec) -> tuple[torch.Tensor, ...]:
        """k_scale and v_scale of a quantised state, nothing for others."""
        return self.scales.get(state.region, ())

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        remaining = list(inputs)
        results: list[torch.Tensor] = []
        for group, states in self.groups:
            positions, kept = remaining.pop(0), None
            caches: list[torch.Tensor] = []
            for state in states:
                mine = [remaining.pop(0) for _ in range(3 if state.observe_tokens else 2)]
                kept, *cache = EvictState(group, state)(positions, *mine, *self.scales_of(state))
                caches += cache
            assert kept is not None
            results += [kept, *caches]
        return tuple(results)


def make_compress(program: Program) -> Program:
    """Add `compress` when a group evicts; the program is unchanged otherwise."""
    groups = tuple((g, program.states_of(g.name)) for g in program.groups if g.evict is not None)
    if not groups:
        return program
    nodes = {r.region: r.node for r in attention_regions(program.forward)}
    scales = {
        state.region: (_scale(program, nodes[state.region], "k"), _scale(program, nodes[state.region], "v"))
        for _, states in groups
        for state in states
        if state.bits
    }
    return replace(program, compress=Compress(groups, scales))


def _scale(program: Program, node: fx.Node, which: str) -> torch.Tensor:
    return program.forward.get_buffer(str(argument(node, f"{which}_scale").target))
