"""Time, memory and state of one model at the workload."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memcompile.evaluate.memory import peak_memory_bytes
from memcompile.evaluate.session import MeasuredSession
from memcompile.evaluate.texts import TokenSource, read_text

Update = Callable[[int, int], None]


def prompt_rows(session: MeasuredSession, parameters: dict[str, Any], prompt_tokens: int) -> list[list[int]]:
    """Return `batch` prompts of `prompt_tokens` tokens.

    They are read from `tokens_file` when another model of this evaluation has left them there, so that a
    model without a tokenizer of its own sees the same tokens.
    """
    batch = int(parameters["batch"])
    tokens_file = Path(parameters["tokens_file"])
    if tokens_file.exists():
        tokens = np.load(tokens_file, allow_pickle=False)
    else:
        text = parameters["text"]
        source = TokenSource(session, read_text(Path(text)) if text else None, seed=parameters["seed"])
        longest = int(parameters.get("longest_prompt_tokens", prompt_tokens))
        windows = [source.window(index, batch, longest) for index in range(batch)]
        tokens = np.asarray(windows, dtype=np.int64)
        np.save(tokens_file, tokens, allow_pickle=False)
    return [[int(token) for token in row[:prompt_tokens]] for row in tokens]


@dataclass(frozen=True, slots=True)
class Prefill:
    """The last logits [B, V], the seconds of prefill and compress, and the state's bytes between the two."""

    logits: NDArray[np.float32]
    prefill_seconds: float
    compress_seconds: float
    state_bytes: int

    @property
    def seconds(self) -> float:
        """Everything that comes before the second token."""
        return self.prefill_seconds + self.compress_seconds


def timed_prefill(session: MeasuredSession, state: Any, rows: list[list[int]]) -> Prefill:
    """Prefill and compress, timing each."""
    begun = time.perf_counter()
    logits = session.prefill(state, rows)
    prefilled = time.perf_counter()
    state_bytes = int(state.nbytes)
    session.compress(state)
    compressed = time.perf_counter()
    last = np.stack([row[-1] for row in logits])
    return Prefill(last, prefilled - begun, compressed - prefilled, state_bytes)


def measure_cost(session: MeasuredSession, parameters: dict[str, Any], update: Update) -> dict[str, Any]:
    """Prefill a prompt, then decode greedily, timing both; report the state's bytes and the process's peak.

    `prefill_seconds` holds compress as well: no second token comes before it. `decode_seconds` has one entry
    per token and none of the sampling.
    """
    rows = prompt_rows(session, parameters, int(parameters["prompt_tokens"]))
    new_tokens, decode_tokens = int(parameters["new_tokens"]), int(parameters["decode_tokens"])
    repeats = max(1, int(parameters.get("repeats", 1)))
    decode_tokens = min(decode_tokens, new_tokens)
    prefills: list[float] = []
    compresses: list[float] = []
    decodes: list[float] = []
    state_bytes = state_bytes_peak = 0
    steps, done = repeats * (decode_tokens + 1), 0
    for _ in range(repeats):
        state = session.new_state(len(rows), max(map(len, rows)), new_tokens)
        allocated = int(state.nbytes)
        prompt = timed_prefill(session, state, rows)
        logits = prompt.logits
        prefills.append(prompt.seconds)
        compresses.append(prompt.compress_seconds)
        state_bytes = int(state.nbytes)
        state_bytes_peak = max(state_bytes_peak, allocated, prompt.state_bytes, state_bytes)
        update(done := done + 1, steps)
        for _ in range(decode_tokens):
            tokens = logits.argmax(axis=-1).astype(np.int64)
            begun = time.perf_counter()
            logits = session.decode(state, tokens)
            decodes.append(time.perf_counter() - begun)
            update(done := done + 1, steps)
        state_bytes_peak = max(state_bytes_peak, int(state.nbytes))
        # freed before the next repeat allocates its own, which would count twice in the peak
        del state
    return {
        "prompt_tokens": len(rows[0]),
        "prefill_seconds": prefills,
        "compress_seconds": compresses,
        "decode_seconds": decodes,
        "state_bytes": state_bytes,
        "state_bytes_peak": state_bytes_peak,
        "peak_memory_bytes": peak_memory_bytes(),
    }
