"""Generate text with any session: prefill, compress, then sample and decode. No backend is named here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from memcompile.errors import MemcompileError
from memcompile.runtime.sampling import Sampler, Sampling
from memcompile.runtime.tokenizer import StopStrings, TextStream

# row, token id, and the text that became certain with it (may be empty)
OnToken = Callable[[int, int, str], None]


class GeneratingSession(Protocol):
    """What generation needs of a session: `Session` here, and the torch backend's."""

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> Any:
        """The state of a batch."""

    def prefill(self, state: Any, rows: Any) -> Any:
        """Read a prompt a row; logits [N,V] a row, the last token's last."""

    def compress(self, state: Any) -> None:
        """Evict after prefill."""

    def decode(self, state: Any, tokens: Any) -> Any:
        """One token a row; logits [B,V]."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation. `finished`: "eos", "stop", "length" (max_new_tokens), "positions" (none left).

    `tokens` leaves the end token out. Times are of the whole batch; decode time is a mean over its steps.
    """

    tokens: tuple[int, ...]
    text: str
    finished: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds_per_token: float
    state_bytes: int


class _Row:
    """One continuation while it grows."""

    def __init__(self, index: int, sampler: Sampler, tokenizer: Any, stop: Sequence[str], limit: int) -> None:
        self.index = index
        self.sampler = sampler
        self.stream = TextStream(tokenizer) if tokenizer is not None else None
        self.stops = StopStrings(stop)
        self.limit = limit
        self.tokens: list[int] = []
        self.text = ""
        self.finished = ""

    def take(self, logits_V: Any, eos: frozenset[int], at_limit: str, on_token: OnToken | None) -> None:
        """Sample a token and see whether the row ends with it."""
        token = self.sampler(logits_V)
        if token in eos:
            self.finished = "eos"
            self._give(token, self._rest(), on_token, new=False)
            return
        self.tokens.append(token)
        piece = self.stops.push(self.stream.push(token)) if self.stream else ""
        if len(self.tokens) >= self.limit:
            self.finished = at_limit
            piece += self._rest()
        if self.stops.stopped:
            self.finished = "stop"
        self._give(token, piece, on_token, new=True)

    def _rest(self) -> str:
        if self.stream is None:
            return ""
        piece = self.stops.push(self.stream.finish())
        return piece if self.stops.stopped else piece + self.stops.finish()

    def _give(self, token: int, piece: str, on_token: OnToken | None, *, new: bool) -> None:
        self.text += piece
        if on_token is not None and (new or piece):
            on_token(self.index, token, piece)


def generate(
    session: GeneratingSession,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    on_token: OnToken | None = None,
    chat: bool = False,
    tokenizer: Any = None,
    eos_token_ids: Sequence[int] = (),
    max_positions: int | None = None,
) -> list[Generation]:
    """Continue each prompt (a text, or token ids) by up to `max_new_tokens`.

    A row ends at an end token of the model, a stop string (its text is cut before it), the limit, or the
    model's last position (`max_positions`; 0 or None: no limit); the others go on. With `chat` a text is put
    into the model's chat format, and the format's own stop strings count too. `on_token(row, token, text)`
    gets text as it becomes certain.

    Raises MC130 (prompt too long), MC131 (empty), MC120 (max_new_tokens below 1).
    """
    if max_new_tokens < 1:
        raise MemcompileError(
            "MC120", f"max_new_tokens is {max_new_tokens}, it must be at least 1",
            fix="raise max_new_tokens; prefill alone gives the logits after a prompt without new tokens",
        )  # fmt: skip
    if isinstance(prompts, str):
        raise MemcompileError(
            "MC120", "prompts is one text, it must be a list of prompts", fix="give [prompt]"
        )
    if not prompts:
        raise MemcompileError("MC131", "there are no prompts", fix="give at least one text or token list")
    if tokenizer is None and (stop or any(isinstance(prompt, str) for prompt in prompts)):
        raise MemcompileError(
            "MC120", "texts and stop strings need a tokenizer, and this model has none", fix="give token ids"
        )
    if chat and tokenizer is not None and tokenizer.chat is not None:
        stop = (*stop, *tokenizer.chat.stop)
    encoded = [tokenizer.encode(p, chat=chat) if isinstance(p, str) else list(p) for p in prompts]
    _check(encoded, max_positions)
    longest = max(len(ids) for ids in encoded)
    # the last sampled token is never fed, so one position more may be sampled than the model has
    positions = max_positions - longest + 1 if max_positions else max_new_tokens
    limit, at_limit = min((max_new_tokens, "length"), (positions, "positions"), key=lambda pair: pair[0])
    sampling = sampling or Sampling()
    rows = [_Row(i, Sampler(sampling, i), tokenizer, stop, limit) for i in range(len(encoded))]

    started = time.perf_counter()
    state = session.new_state(len(rows), longest, limit - 1)
    first = session.prefill(state, encoded)
    session.compress(state)
    prefill_seconds = time.perf_counter() - started

    eos = frozenset(eos_token_ids)
    for row in rows:
        row.take(first[row.index][-1], eos, at_limit, on_token)
    started, steps = time.perf_counter(), 0
    while not all(row.finished for row in rows):
        # a finished row is fed its last token again; what it answers is not looked at
        tokens = np.array([row.tokens[-1] if row.tokens else 0 for row in rows], np.int64)
        logits = session.decode(state, tokens)
        steps += 1
        for row in rows:
            if not row.finished:
                row.take(logits[row.index], eos, at_limit, on_token)
    per_token = (time.perf_counter() - started) / steps if steps else 0.0
    nbytes = int(state.nbytes)
    return [
        Generation(tuple(row.tokens), row.text, row.finished, len(ids), prefill_seconds, per_token, nbytes)
        for row, ids in zip(rows, encoded, strict=True)
    ]


def _check(encoded: list[list[int]], max_positions: int | None) -> None:
    for index, ids in enumerate(encoded):
        where = f"prompt {index + 1} of {len(encoded)}" if len(encoded) > 1 else None
        if not ids:
            raise MemcompileError(
                "MC131", "the prompt is empty (0 tokens)", where=where, fix="give some text"
            )
        if max_positions and len(ids) > max_positions:
            raise MemcompileError(
                "MC130", f"the prompt has {len(ids)} tokens, the model has {max_positions} positions",
                where=where, fix=f"shorten it to {max_positions} tokens or fewer",
            )  # fmt: skip
