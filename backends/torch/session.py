"""Run a program in torch step by step: the judge of every other backend, and `CompiledModel.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from memcompile.backends.torch.placement import place
from memcompile.backends.torch.tuned import with_choices
from memcompile.dialect import visible_keys
from memcompile.program import PositionGroup, Program
from memcompile.tuning import Choices

# tokens that a windowed cache may hold beyond what can be seen, so that trimming is not done at every step
TRIM_SLACK = 64


@dataclass
class TorchState:
    """The caches of a batch: per region keys and values, per group the positions of the cached tokens."""

    batch: int
    caches: dict[str, list[torch.Tensor]]
    observed: dict[str, torch.Tensor]
    bounds: dict[str, torch.Tensor]
    neurons: dict[str, torch.Tensor]
    tables: dict[str, torch.Tensor]
    lengths: torch.Tensor
    compressed: bool = field(default=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors now."""
        tensors = [t for pair in self.caches.values() for t in pair]
        tensors += [*self.observed.values(), *self.bounds.values(), *self.tables.values()]
        tensors += self.neurons.values()
        return sum(t.numel() * t.element_size() for t in tensors)


class TorchSession:
    """A causal program with the methods of `memcompile.runtime.Session`.

    The step graph, and the parameters that it shares with the program's others, are moved to `device`. With
    `choices` each region runs on what was measured as fastest for it.
    """

    def __init__(self, program: Program, device: str = "cpu", choices: Choices | None = None) -> None:
        assert program.step is not None, "only causal models are run step by step"
        self.program = program
        self.device = torch.device(device)
        # what was chosen by measurements; `CompiledModel.report` tells it
        self.decisions = choices.decisions if choices is not None else ()
        self._alone = program.decodes_alone
        step = program.step if choices is None else with_choices(program.step, choices)
        self._step = step.eval()
        place(self._step.to(self.device), self.device)

    def new_state(self, batch: int, prompt_tokens: int = 0, new_tokens: int = 0) -> TorchState:
        """Empty caches for `batch` rows; sizes grow as needed."""
        caches = {
            s.region: [
                torch.zeros(batch, s.kv_heads, 0, s.storage_width, dtype=s.storage_dtype, device=self.device)
                for _ in ("k", "v")
            ]
            for s in self.program.states
        }
        observed = {
            s.region: torch.zeros(batch, s.heads, 0, s.head_dim, dtype=s.dtype, device=self.device)
            for s in self.program.states
            if s.observe_tokens
        }
        bounds = {
            s.region: torch.zeros(
                batch, s.kv_heads, 0, 2 * s.storage_width, dtype=s.storage_dtype, device=self.device
            )
            for s in self.program.states
            if s.page_tokens
        }
        neurons = {
            s.region: torch.zeros(batch, s.neurons, device=self.device)
            for s in self.program.states
            if s.neurons
        }
        positions = torch.zeros(batch, 0, dtype=torch.int64, device=self.device)
        tables = {g.name: positions for g in self.program.groups}
        lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return TorchState(batch, caches, observed, bounds, neurons, tables, lengths)

    @torch.no_grad()
    def step(
        self, state: TorchState, tokens: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """One call of the step graph: tokens [B,T], valid [B,T] (valid first), rows [B,N]; gives logits."""
        tokens, valid, rows = (x.to(self.device) for x in (tokens, valid, rows))
        columns = torch.arange(tokens.shape[1], device=self.device)
        positions = torch.where(valid, state.lengths.unsqueeze(1) + columns, -1)
        tables = {name: torch.cat((table, positions), dim=1) for name, table in state.tables.items()}
        arguments: list[torch.Tensor] = [tokens, positions.clamp(min=0), rows]
        arguments += [tables[g.name] for g in self.program.groups]
        for s in self.program.states:
            arguments += state.caches[s.region]
        arguments += [*state.observed.values(), *state.bounds.values(), *state.neurons.values()]
        results = list(self._step(*arguments))
        logits: torch.Tensor = results.pop(0).cpu()
        for s in self.program.states:
            state.caches[s.region] = [results.pop(0), results.pop(0)]
        for region in state.observed:
            state.observed[region] = results.pop(0)
        for region in state.bounds:
            state.bounds[region] = results.pop(0)
        for region in state.neurons:
            state.neurons[region] = results.pop(0)
        state.tables = tables
        state.lengths = state.lengths + valid.sum(dim=1)
        for group in self.program.groups:
            self._trim(state, group)
        return logits

    def prefill(
        self, state: TorchState, rows: Sequence[Sequence[int]], *, all_logits: bool = False
    ) -> list[np.ndarray]:
        """Read one prompt a row; gives float32 logits [N,V] a row: of its last token, or of all of them."""
        longest = max(len(row) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.as_tensor(row)
            valid[index, : len(row)] = True
        counts = valid.sum(dim=1, keepdim=True)
        wanted = torch.arange(longest).repeat(len(rows), 1) if all_logits else counts - 1
        logits = self.step(state, tokens, valid, wanted).float().numpy()
        return [logits[i, : int(counts[i])] if all_logits else logits[i] for i in range(len(rows))]

    def decode(self, state: TorchState, tokens: np.ndarray) -> np.ndarray:
        """One token a row, int [B]; logits [B,V]."""
        column = torch.as_tensor(np.asarray(tokens, dtype=np.int64)).unsqueeze(1)
        valid = torch.ones_like(column, dtype=torch.bool)
        logits: np.ndarray = self.step(state, column, valid, torch.zeros_like(column))[:, 0].float().numpy()
        return logits

    def extend(self, state: TorchState, tokens: Sequence[int]) -> np.ndarray:
        """Continue the single row of `state` with known tokens; logits [T,V]."""
        if self._alone and len(tokens) > 1:
            # only a call of one token chooses pages and neurons: what is measured is what decoding does
            return np.concatenate([self.extend(state, [token]) for token in tokens])
        row = torch.as_tensor(list(tokens)).unsqueeze(0)
        wanted = torch.arange(row.shape[1]).unsqueeze(0)
        logits: np.ndarray = (
            self.step(state, row, torch.ones_like(row, dtype=torch.bool), wanted)[0].float().numpy()
        )
        return logits

    @torch.no_grad()
    def compress(self, state: TorchState) -> None:
        """Evict once after prefill; nothing happens without an evicting group, or a second time."""
        if self.program.compress is None or state.compressed:
            return
        groups = [g for g in self.program.groups if g.evict is not None]
        arguments: list[torch.Tensor] = []
        for group in groups:
            arguments.append(state.tables[group.name])
            for s in self.program.states_of(group.name):
                arguments += state.caches[s.region]
                arguments += [state.observed[s.region]] if s.observe_tokens else []
        results = list(self.program.compress(*arguments))
        for group in groups:
            state.tables[group.name] = results.pop(0)
            for s in self.program.states_of(group.name):
                state.caches[s.region] = [results.pop(0), results.pop(0)]
        state.compressed = True

    def _trim(self, state: TorchState, group: PositionGroup) -> None:
        """Drop what no later query can see from the caches of a windowed group."""
        if not group.window:
            return
        table = state.tables[group.name]
        seen = visible_keys(
            state.lengths.unsqueeze(1), table, causal=True, window=group.window, sinks=group.sinks,
            block=group.block, stride=group.stride,
        )[:, 0]  # fmt: skip
        most = int(seen.sum(dim=1).max())
        if table.shape[1] - most <= TRIM_SLACK:
            return
        order = torch.argsort(seen.logical_not().long(), dim=1, stable=True)[:, :most]
        keep = torch.gather(seen, 1, order)
        state.tables[group.name] = torch.where(keep, torch.gather(table, 1, order), -1)
        for s in self.program.states_of(group.name):
            index = order.reshape(state.batch, 1, most, 1).expand(-1, s.kv_heads, -1, s.storage_width)
            state.caches[s.region] = [torch.gather(t, 2, index) for t in state.caches[s.region]]
