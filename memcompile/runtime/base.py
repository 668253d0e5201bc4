"""What the sessions of all backends share: checks, prefill in chunks, eviction, decoding, generation."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import Artifact, Manifest
from memcompile.errors import MemcompileError
from memcompile.runtime.cache import NEW, PREFILLED, State
from memcompile.runtime.forward import check_feeds
from memcompile.runtime.generate import Generation, OnToken, generate
from memcompile.runtime.sampling import Sampling
from memcompile.runtime.tokenizer import Tokenizer

Logits = NDArray[np.float32]
OnLogits = Callable[[int, int, Logits], None]


def logits_width(manifest: Manifest) -> int:
    """Logits a position: the graph may have more than the tokenizer has tokens."""
    width = manifest.functions["step"].outputs[0].dims[-1]
    return width if isinstance(width, int) else manifest.model.vocab_size


class Binding(Protocol):
    """Calls of `step` on the buffers of one state."""

    state: State

    def feed(self, row: int, tokens: NDArray[np.int64], logits_NV: Logits, all_logits: bool) -> None:
        """Run `tokens` as the next ones of a row, for which room has been made; logits go to `logits_NV`."""

    def decode(self, tokens: NDArray[np.int64]) -> Logits:
        """Run one token of every row, for which room has been made; returns the logits [B,V]."""


class BaseSession(ABC):
    """An opened artifact of any backend. A backend opens its functions, runs them, and binds states."""

    backend: ClassVar[str]

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, provider: str | None = None
    ) -> None:
        self.artifact = artifact
        self.provider = provider or artifact.manifest.device
        self.threads = threads or artifact.manifest.threads or os.cpu_count() or 1
        if self.manifest.backend != self.backend:
            raise MemcompileError(
                "MC112",
                f"the artifact is for backend {self.manifest.backend!r}, this session runs {self.backend!r}",
                where=str(artifact.path),
                fix="open it with memcompile.runtime.load",
            )
        self._functions = {name: self._open(name) for name in self.manifest.functions}
        self._tokenizer: Tokenizer | None = None
        self._last_binding: Binding | None = None

    @abstractmethod
    def _open(self, name: str) -> Any:
        """Open a function of the artifact."""

    @abstractmethod
    def _bind(self, state: State) -> Binding:
        """Bind a state's buffers to `step`."""

    @abstractmethod
    def _run(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a function without state; its outputs in the manifest's order."""

    @property
    def manifest(self) -> Manifest:
        """What the artifact says about itself."""
        return self.artifact.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises MC506 when it has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.open(self.artifact)
        return self._tokenizer

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> State:
        """Allocate the caches of `batch` rows: prompts of at most `prompt_tokens`, then `new_tokens` more."""
        self._function("step")
        for name, value, low in (
            ("batch", batch, 1),
            ("prompt_tokens", prompt_tokens, 1),
            ("new_tokens", new_tokens, 0),
        ):
            if value < low:
                raise MemcompileError(
                    "MC120", f"{name} is {value}, it must be at least {low}",
                    fix="give the number of prompts, the length of the longest, and the tokens to follow",
                )  # fmt: skip
        self._check_positions(prompt_tokens)
        return State(self.manifest, batch, prompt_tokens, new_tokens, device=self.provider)

    def prefill(
        self,
        state: State,
        rows: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        on_logits: OnLogits | None = None,
    ) -> list[Logits]:
        """Read the prompts, one a row of the state, in chunks; once per state.

        Returns [N,V] a row: N is 1 (its last token), or its tokens with `all_logits`. With `on_logits` the
        chunks go to `on_logits(row, first_token, logits_TV)` as they come, and an empty list is returned.
        Raises MC130 (prompt too long), MC131 (empty) and MC120 (not what the state was made for).
        """
        if state.phase != NEW:
            raise MemcompileError("MC120", "this state has been prefilled already", fix="make a new state")
        if len(rows) != state.batch:
            raise MemcompileError(
                "MC120", f"{len(rows)} prompts for a state of {state.batch} rows",
                fix=f"make the state with batch={len(rows)}",
            )  # fmt: skip
        for row in rows:
            self._check_prompt(row, state)
        results = []
        for index, row in enumerate(rows):
            tokens = np.asarray(row, np.int64)
            logits = self._feed(state, index, tokens, all_logits or on_logits is not None, on_logits)
            if logits is not None:
                results.append(logits)
        state.finish_prefill()
        return results

    def compress(self, state: State) -> None:
        """Evict after prefill what the artifact's `compress` drops; does nothing without one, or twice."""
        if "compress" not in self._functions or state.compressed:
            return
        if state.phase != PREFILLED:
            raise MemcompileError(
                "MC120", "compress comes after prefill and before the first decoded token",
                fix="call prefill, compress, then decode",
            )  # fmt: skip
        inputs = [tensor.name for tensor in self.manifest.functions["compress"].inputs]
        groups = [group for group in self.manifest.groups if group.evict is not None]
        results = [
            self._run("compress", self._compress_feeds(state, row, inputs)) for row in range(state.batch)
        ]
        taken = 0
        for group in groups:
            members = state.members(group)
            width = 1 + 2 * len(members)
            positions = [result[taken][0] for result in results]
            held = [row[row >= 0] for row in positions]
            kept = [[value[0] for value in result[taken + 1 : taken + width]] for result in results]
            state.replace_group(group, held, kept)
            taken += width
        state.finish_compress()

    def decode(self, state: State, tokens: NDArray[np.integer[Any]] | Sequence[int]) -> Logits:
        """Append one token to every row; returns the logits that follow, [B,V]."""
        given = np.asarray(tokens, np.int64)
        if given.shape != (state.batch,):
            raise MemcompileError(
                "MC120", f"decode needs {state.batch} tokens, one a row; got shape {given.shape}",
                fix="give one token a row; extend takes several tokens of a single row",
            )  # fmt: skip
        self._check_positions(int(state.lengths.max()) + 1)
        state.count_new(1)
        state.reserve_one_each()
        return self._binding(state).decode(given)

    def extend(self, state: State, tokens: Sequence[int], *, on_logits: OnLogits | None = None) -> Logits:
        """Append known tokens to the single row of a prefilled state; gives the logits after each, [T,V]."""
        if state.batch != 1:
            raise MemcompileError(
                "MC120", f"extend needs a state of one row, this one has {state.batch}",
                fix="make a state with batch=1 for each prompt, or decode one token of every row at a time",
            )  # fmt: skip
        if not len(tokens):
            raise MemcompileError(
                "MC131", "there are no tokens to extend with", fix="give one or more tokens"
            )
        self._check_positions(int(state.lengths[0]) + len(tokens))
        state.count_new(len(tokens))
        if self.manifest.prefill.extend_tokens:
            # what is measured has to be what decoding does, where that differs from reading
            state.chunk_tokens = min(state.chunk_tokens, self.manifest.prefill.extend_tokens)
        logits = self._feed(state, 0, np.asarray(tokens, np.int64), True, on_logits)
        return np.zeros((0, logits_width(self.manifest)), np.float32) if logits is None else logits

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_token: OnToken | None = None,
        chat: bool = False,
    ) -> list[Generation]:
        """Continue each prompt; see `memcompile.runtime.generate.generate`."""
        model = self.manifest.model
        return generate(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            on_token=on_token,
            chat=chat,
            tokenizer=None if self.manifest.tokenizer is None else self.tokenizer,
            eos_token_ids=model.eos_token_ids,
            max_positions=model.max_positions,
        )

    def forward(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a model that is not causal. Raises MC120 for inputs that do not fit, naming those that do."""
        self._function("forward")
        entry = self.manifest.functions["forward"]
        names = [tensor.name for tensor in entry.outputs]
        return dict(zip(names, self._run("forward", check_feeds(entry, feeds)), strict=True))

    def _feed(
        self, state: State, row: int, tokens: NDArray[np.int64], all_logits: bool, on_logits: OnLogits | None
    ) -> Logits | None:
        """Run a row's tokens in chunks; logits of all, or of the last (None when they went elsewhere)."""
        vocab = logits_width(self.manifest)
        keep = all_logits and on_logits is None
        logits: Logits = np.empty((len(tokens) if keep else 1, vocab), np.float32)
        start = 0
        while start < len(tokens):
            count = state.reserve(row, min(state.chunk_tokens, len(tokens) - start))
            if keep:
                target = logits[start : start + count]
            elif on_logits is not None:
                target = np.empty((count, vocab), np.float32)
            else:
                target = logits
            self._binding(state).feed(row, tokens[start : start + count], target, all_logits)
            if on_logits is not None:
                on_logits(row, start, target)
            start += count
        return None if on_logits is not None else logits

    def _binding(self, state: State) -> Binding:
        binding = self._last_binding
        if binding is None or binding.state is not state:
            # only the last one is kept: a binding keeps the buffers of its state alive
            self._last_binding = binding = self._bind(state)
        return binding

    def _compress_feeds(self, state: State, row: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        values: list[NDArray[Any]] = []
        for group in self.manifest.groups:
            if group.evict is None:
                continue
            values.append(state.tables[group.name].positions[row : row + 1])
            for caches in state.members(group):
                values += [caches.key.row(row)[None], caches.value.row(row)[None]]
                if caches.observed is not None:
                    values.append(caches.observed.row(row)[None])
        if len(values) != len(names):
            raise MemcompileError(
                "MC505",
                f"compress takes {len(names)} inputs, the evicted groups and their states make {len(values)}",
                where=str(self.artifact.path),
                fix="make the artifact again: its manifest and its compress graph are not of one run",
            )  # fmt: skip
        return dict(zip(names, values, strict=True))

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            raise MemcompileError(
                "MC120", f"the artifact has no function {name!r}, only {', '.join(sorted(self._functions))}",
                where=str(self.artifact.path),
                fix="use forward for a model that is not causal, generate for one that is",
            )  # fmt: skip
        return self._functions[name]

    def _check_prompt(self, row: Sequence[int], state: State) -> None:
        if not len(row):
            raise MemcompileError("MC131", "the prompt is empty (0 tokens)", fix="give at least one token")
        self._check_positions(len(row))
        if len(row) > state.prompt_tokens:
            raise MemcompileError(
                "MC120", f"the prompt has {len(row)} tokens, the state was made for {state.prompt_tokens}",
                fix="make the state with more prompt_tokens",
            )  # fmt: skip
        vocab = self.manifest.model.vocab_size
        if vocab and not 0 <= min(row) <= max(row) < vocab:
            raise MemcompileError(
                "MC120", f"the prompt has token ids outside 0..{vocab - 1}",
                fix="encode the text with the artifact's own tokenizer",
            )  # fmt: skip

    def _check_positions(self, tokens: int) -> None:
        limit = self.manifest.model.max_positions
        if limit and tokens > limit:
            raise MemcompileError(
                "MC130", f"{tokens} tokens are more than the model's {limit} positions",
                fix=f"shorten the prompt to {limit} tokens or fewer",
            )  # fmt: skip
