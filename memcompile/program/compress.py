"""The `compress` function of a program: after prefill, keep the chosen tokens of each evicted cache."""

from __future__ import annotations

from dataclasses import replace

import torch

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


class CompressGroup(torch.nn.Module):
    """Evict from every cache of one group.

    forward(positions [B,S], then for each state key, value and, if it observes, observed) gives the new
    positions [B,K] (0..kept-1, then -1: every kept token stays visible) and each state's key and value.
    """

    def __init__(
        self, group: PositionGroup, states: tuple[StateSpec, ...], scales: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.group = group
        self.states = states
        for name, value in scales.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, positions: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spec = self.group.evict
        assert spec is not None
        remaining = list(caches)
        results: list[torch.Tensor] = []
        kept = torch.zeros(1)
        slots = positions.unsqueeze(1)
        for state in self.states:
            key, value = remaining.pop(0), remaining.pop(0)
            observed = remaining.pop(0) if state.observe_tokens else None
            scores = spec.scorer(
                self._wide(key, state, "k"), self._wide(value, state, "v"), observed, positions
            )
            slots, kept = choose_tokens(scores, positions, self.group)
            index = slots.unsqueeze(-1).expand(-1, -1, -1, state.storage_width)
            results += [torch.gather(key, 2, index), torch.gather(value, 2, index)]
        rank = torch.arange(slots.shape[2], device=positions.device).unsqueeze(0)
        new_positions = torch.where(rank < kept.unsqueeze(1), rank, -1)
        return (new_positions, *results)

    def _wide(self, cache: torch.Tensor, state: StateSpec, which: str) -> torch.Tensor:
        if not state.bits:
            return cache
        return dequantize(cache, getattr(self, f"{which}_scale_{state.slug}"), state.bits, state.head_dim)


class Compress(torch.nn.Module):
    """`compress` of a whole program: its evicted groups in order, each with its caches."""

    def __init__(self, groups: list[CompressGroup]) -> None:
        super().__init__()
        self.groups = torch.nn.ModuleList(groups)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs and outputs of each group, one group after the other."""
        remaining = list(inputs)
        results: list[torch.Tensor] = []
        for group in self.groups:
            assert isinstance(group, CompressGroup)
            count = 1 + sum(3 if s.observe_tokens else 2 for s in group.states)
            mine, remaining = remaining[:count], remaining[count:]
            results += group(*mine)
        return tuple(results)


def make_compress(program: Program) -> Program:
    """Add `compress` when a group evicts; the program is unchanged otherwise."""
    assert program.step is not None
    scales: dict[str, dict[str, torch.Tensor]] = {}
    by_region = {r.region: r for r in attention_regions(program.forward)}
    groups = []
    for group in program.groups:
        if group.evict is None:
            continue
        states = program.states_of(group.name)
        scales = {}
        for state in states:
            if state.bits:
                node = by_region[state.region].node
                for which in ("k", "v"):
                    name = str(argument(node, f"{which}_scale").target)
                    scales[f"{which}_scale_{state.slug}"] = program.forward.get_buffer(name)  # type: ignore[assignment]
        groups.append(CompressGroup(group, states, scales))  # type: ignore[arg-type]
    return replace(program, compress=Compress(groups)) if groups else program
