"""Perplexity, KL to the original and top-1 agreement, over tokens that a rewritten state predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memcompile.errors import MemcompileError
from memcompile.evaluate import scoring
from memcompile.evaluate.cost import Update, timed_prefill
from memcompile.evaluate.session import MeasuredSession
from memcompile.evaluate.texts import TokenSource, read_text

# 64 positions of a 262k vocabulary are 64 MiB of float32 logits
EXTEND_TOKENS: Final = 64
FLOAT32_LIMIT_BYTES: Final = 1 << 30


def continuation_length(session: MeasuredSession, prompt_tokens: int, wanted: int) -> int:
    """Return how many tokens can follow the prompt within the model's positions; MC130 when none can."""
    positions = session.manifest.model.max_positions
    room = wanted if not positions else min(wanted, int(positions) - prompt_tokens)
    if room < 2:
        raise MemcompileError(
            "MC130",
            f"a prompt of {prompt_tokens} tokens leaves no room to evaluate in {positions} positions",
            where="workload.prompt_tokens",
            fix="lower workload.prompt_tokens",
        )
    return room


def measure_perplexity(
    session: MeasuredSession, parameters: dict[str, Any], update: Update
) -> dict[str, Any]:
    """Score the continuations of evenly spaced windows: prefill, compress, then teacher-force.

    With `save_to`, the log-probabilities [windows * continuation, V] are written there (the original's
    worker); with `compare_to`, KL and agreement are measured against those written there (the rewritten's).
    """
    text = parameters["text"]
    source = TokenSource(session, read_text(Path(text)) if text else None, seed=parameters["seed"])
    prompt_tokens, windows = int(parameters["prompt_tokens"]), int(parameters["windows"])
    length = continuation_length(session, prompt_tokens, int(parameters["continuation_tokens"]))
    positions = windows * length
    vocab_size = int(session.manifest.model.vocab_size)
    saved = _create(parameters.get("save_to"), positions, vocab_size)
    reference = _open(parameters.get("compare_to"), positions, vocab_size)
    losses: list[NDArray[np.float64]] = []
    divergences: list[NDArray[np.float64]] = []
    agreed, done, prefill_seconds = 0, 0, []
    for index in range(windows):
        tokens = source.window(index, windows, prompt_tokens + length)
        state = session.new_state(1, prompt_tokens, length)
        prompt = timed_prefill(session, state, [tokens[:prompt_tokens]])
        prefill_seconds.append(prompt.seconds)
        targets = np.asarray(tokens[prompt_tokens:], dtype=np.int64)
        logits, start = prompt.logits, 0
        while True:
            log_probs = scoring.log_probabilities(logits)
            stop = start + log_probs.shape[0]
            losses.append(scoring.token_losses(log_probs, targets[start:stop]))
            row = index * length + start
            if saved is not None:
                saved[row : row + log_probs.shape[0]] = log_probs
            if reference is not None:
                original = np.asarray(reference[row : row + log_probs.shape[0]])
                divergences.append(scoring.kl_divergence(original, log_probs))
                agreed += int((original.argmax(axis=1) == log_probs.argmax(axis=1)).sum())
            start = stop
            update(done := done + log_probs.shape[0], positions)
            if start >= length:
                break
            # position `start` is predicted by the token before it
            logits = session.extend(state, tokens[prompt_tokens + start - 1 :][: _piece(start, length)])
        del state
    if saved is not None:
        saved.flush()
    result: dict[str, Any] = {
        "losses": np.concatenate(losses).round(5).tolist(),
        "windows": windows,
        "prompt_tokens": prompt_tokens,
        "continuation_tokens": length,
        "synthetic": source.synthetic,
        "prefill_seconds": prefill_seconds,
    }
    if reference is not None:
        # rounding of nearly equal distributions may fall below zero
        result["kl"] = np.maximum(np.concatenate(divergences), 0.0).tolist()
        result["agreed"] = agreed
    return result


def _piece(start: int, length: int) -> int:
    return min(EXTEND_TOKENS, length - start)


def _create(path: str | None, positions: int, vocab_size: int) -> Any:
    """Open a new .npy file for log-probabilities; half precision once single would pass a gibibyte."""
    if path is None:
        return None
    dtype = np.float32 if positions * vocab_size * 4 <= FLOAT32_LIMIT_BYTES else np.float16
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(positions, vocab_size))


def _open(path: str | None, positions: int, vocab_size: int) -> Any:
    if path is None:
        return None
    saved = np.load(path, mmap_mode="r", allow_pickle=False)
    if saved.shape != (positions, vocab_size):
        raise MemcompileError(
            "MC402",
            f"the original scored {saved.shape[0]} positions of {saved.shape[1]} tokens, the rewritten model "
            f"{positions} of {vocab_size}: their predictions cannot be compared",
            fix="compare two artifacts of one model",
        )
    return saved
