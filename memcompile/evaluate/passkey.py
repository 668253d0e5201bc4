"""Passkey retrieval: hide a five-digit key at a depth of the prompt, ask for it, and read the answer.

After Mohtashami & Jaggi 2023, "Landmark Attention", arXiv:2305.16300, with its haystack: five short
sentences that repeat. In running text a small model does not find the key even with its whole cache, and
nothing is left to measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from memcompile.evaluate import scoring
from memcompile.evaluate.cost import Update, timed_prefill
from memcompile.evaluate.session import MeasuredSession
from memcompile.evaluate.texts import TokenSource

_OPENING: Final = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
_NEEDLE: Final = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_FILLER: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_QUESTION: Final = "\n\nWhat is the pass key?"
_LEAD: Final = "The pass key is"
_SENTENCE_SEARCH_TOKENS: Final = 40
_ANSWER_ROOM_TOKENS: Final = 16
_SENTENCE_ENDS: Final = (".", "!", "?", ".\n", "\n", '."')


@dataclass(frozen=True, slots=True)
class PasskeyPrompt:
    """A prompt of exact length and the tokens that answer it."""

    tokens: list[int]
    answer: list[int]
    needle_start: int


def build_prompt(source: TokenSource, *, depth: float, tokens: int, key: str) -> PasskeyPrompt:
    """Return `tokens` tokens: opening, filler with the needle at `depth` (0 start, 1 end) of it, question.

    The needle moves back to the end of a sentence.
    """
    before, after = (source.chat.prefix, source.chat.suffix) if source.chat is not None else ("", "\n")
    opening = source.start_ids + source.encode(before + _OPENING)
    needle = source.encode(_NEEDLE.format(key=key))
    ending = _QUESTION + after + _LEAD
    question = source.encode(ending)
    haystack_tokens = tokens - len(opening) - len(needle) - len(question)
    haystack = _filler(source, max(haystack_tokens, 0))
    cut = _sentence_end(source, haystack, round(depth * len(haystack)))
    return PasskeyPrompt(
        tokens=[*opening, *haystack[:cut], *needle, *haystack[cut:], *question],
        answer=_answer(source, ending, question, key),
        needle_start=len(opening) + cut,
    )


def _filler(source: TokenSource, tokens: int) -> list[int]:
    repeats = tokens // len(source.encode(_FILLER)) + 2
    while len(ids := source.encode((_FILLER * repeats).rstrip())) < tokens:
        repeats *= 2
    return ids[:tokens]


def _sentence_end(source: TokenSource, haystack: list[int], at: int) -> int:
    for cut in range(at, max(0, at - _SENTENCE_SEARCH_TOKENS), -1):
        if source.decode(haystack[cut - 1 : cut]).endswith(_SENTENCE_ENDS):
            return cut
    return at


def _answer(source: TokenSource, ending: str, question: list[int], key: str) -> list[int]:
    """The tokens of " KEY" as they follow the question; on their own where tokens would merge."""
    joined = source.encode(f"{ending} {key}")
    return joined[len(question) :] if joined[: len(question)] == question else source.encode(f" {key}")


def _with_room(session: MeasuredSession, prompt_tokens: int) -> int:
    """The prompt's length, less what the answer needs when the model's positions end there."""
    positions = session.manifest.model.max_positions
    return prompt_tokens if not positions else min(prompt_tokens, int(positions) - _ANSWER_ROOM_TOKENS)


def passkey_fits(source: TokenSource, prompt_tokens: int) -> bool:
    """Whether there is a tokenizer, and a prompt of this length has room for a haystack around the needle."""
    if not source.has_tokenizer:
        return False
    fixed = source.encode(_OPENING + _NEEDLE.format(key="00000") + _QUESTION + _LEAD)
    chat = source.encode(source.chat.prefix + source.chat.suffix) if source.chat is not None else []
    return prompt_tokens >= 2 * (len(fixed) + len(chat))


def measure_passkey(session: MeasuredSession, parameters: dict[str, Any], update: Update) -> dict[str, Any]:
    """Ask for one key per depth: prefill, compress, then teacher-force the answer.

    A greedy decode gives the answer exactly when every teacher-forced token is the most likely one, so one
    pass gives accuracy and the log-probability of the answer (mean per token).
    """
    source = TokenSource(session, None, seed=parameters["seed"])
    prompt_tokens = _with_room(session, int(parameters["prompt_tokens"]))
    depths = [float(depth) for depth in parameters["depths"]]
    if not passkey_fits(source, prompt_tokens):
        return {"points": []}
    generator = np.random.default_rng(parameters["seed"])
    points: list[dict[str, Any]] = []
    for index, depth in enumerate(depths):
        key = str(generator.integers(10_000, 100_000))
        prompt = build_prompt(source, depth=depth, tokens=prompt_tokens, key=key)
        state = session.new_state(1, len(prompt.tokens), len(prompt.answer))
        first = timed_prefill(session, state, [prompt.tokens]).logits
        rest = session.extend(state, prompt.answer[:-1]) if len(prompt.answer) > 1 else first[:0]
        log_probs = scoring.log_probabilities(np.concatenate([first, rest]))
        answer = np.asarray(prompt.answer, dtype=np.int64)
        guessed = log_probs.argmax(axis=1)
        points.append(
            {
                "depth": depth,
                "key": key,
                "prompt_tokens": len(prompt.tokens),
                "needle_start": prompt.needle_start,
                "correct": bool((guessed == answer).all()),
                "logprob": float(-scoring.token_losses(log_probs, answer).mean()),
                "guessed": source.decode([int(token) for token in guessed]),
            }
        )
        update(index + 1, len(depths))
        del state
    return {"points": points}
