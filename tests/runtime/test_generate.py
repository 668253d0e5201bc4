"""The generation loop, on a session that says what it is told to say, and on a real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from memcompile.artifact import ChatEntry
from memcompile.errors import MemcompileError
from memcompile.runtime import Sampling
from memcompile.runtime.generate import Generation, generate
from memcompile.runtime.tokenizer import Tokenizer
from tests.runtime.conftest import OpenTiny
from tests.runtime.test_split_law import tokens_of
from tests.runtime.test_tokenizer import byte_tokenizer
from tests.runtime.tiny_artifact import Layer, TinyModel, reference

EOS = 257
TOKENIZER = Tokenizer(byte_tokenizer())


@dataclass
class Script:
    """A session that continues row r by `answers[r]`, then by end tokens."""

    answers: list[list[int]]
    decoded: int = 0
    compressed: int = 0
    made: tuple[int, ...] = ()

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> Any:
        self.made = (batch, prompt_tokens, new_tokens)
        return self

    @property
    def nbytes(self) -> int:
        return 7

    def _logits(self, step: int) -> np.ndarray:
        tokens = [answer[step] if step < len(answer) else EOS for answer in self.answers]
        return np.eye(258, dtype=np.float32)[tokens]

    def prefill(self, state: Any, rows: Any) -> list[np.ndarray]:
        return [row[None] for row in self._logits(0)]

    def compress(self, state: Any) -> None:
        self.compressed += 1

    def decode(self, state: Any, tokens: Any) -> np.ndarray:
        self.decoded += 1
        assert self.decoded <= self.made[2], "more tokens than the state was made for"
        return self._logits(self.decoded)


def said(answer: str, **options: Any) -> tuple[Generation, list[str], Script]:
    session = Script([TOKENIZER.encode(answer)])
    pieces: list[str] = []
    options = {"max_new_tokens": 100, "tokenizer": TOKENIZER, "eos_token_ids": (EOS,)} | options
    (result,) = generate(session, ["hi"], on_token=lambda row, token, text: pieces.append(text), **options)
    assert "".join(pieces) == result.text
    return result, pieces, session


def test_an_answer_ends_at_the_end_token() -> None:
    result, _, session = said("good")
    assert (result.text, result.finished, len(result.tokens)) == ("good", "eos", 4)
    assert session.compressed == 1
    assert result.prompt_tokens == 2
    assert result.state_bytes == 7
    assert result.prefill_seconds > 0
    assert result.decode_seconds_per_token > 0


def test_the_limit_counts_new_tokens() -> None:
    result, _, session = said("good", max_new_tokens=3)
    assert (result.text, result.finished, session.decoded) == ("goo", "length", 2)
    result, _, session = said("good", max_new_tokens=1)
    assert (result.text, result.finished, session.decoded) == ("g", "length", 0)
    assert result.decode_seconds_per_token == 0.0


def test_the_models_last_position_ends_an_answer() -> None:
    result, _, session = said("goodness", max_positions=5)
    assert (result.text, result.finished) == ("good", "positions")
    assert session.made == (1, 2, 3)


def test_a_stop_string_over_several_tokens_cuts_the_text() -> None:
    result, pieces, session = said("yes.\nUser: no", stop=["\nUser:"])
    assert (result.text, result.finished) == ("yes.", "stop")
    assert session.decoded == len("yes.\nUser:") - 1
    assert len(result.tokens) == len("yes.\nUser:")
    assert pieces[4:] == [""] * 6


def test_what_was_held_back_for_a_stop_is_given_at_the_end() -> None:
    assert said("yes.\nUse", stop=["\nUser:"])[0].text == "yes.\nUse"
    result = said("yes.\nUser", stop=["\nUser:"], max_new_tokens=8)[0]
    assert (result.text, result.finished) == ("yes.\nUse", "length")


def test_a_stop_string_at_the_limit_is_a_stop() -> None:
    result = said("ab.", stop=["."], max_new_tokens=3)[0]
    assert (result.text, result.finished) == ("ab", "stop")


def test_text_streams_in_whole_characters() -> None:
    result, pieces, _ = said("né 😀!")
    assert pieces == ["n", "", "é", " ", "", "", "", "😀", "!"]
    assert result.text == "né 😀!"
    assert said("😀", max_new_tokens=2)[0].text == "\ufffd"


def test_the_chat_format_brings_its_own_stop() -> None:
    chat = Tokenizer(byte_tokenizer(), chat=ChatEntry("Q:", "A:", ("Q:",)))
    result, _, session = said("fine Q: and", tokenizer=chat, chat=True)
    assert (result.text, result.finished) == ("fine ", "stop")
    assert session.made[1] == len("Q:hiA:")


def test_rows_end_on_their_own() -> None:
    session = Script([TOKENIZER.encode(text) for text in ("a", "", "long answer")])
    results = generate(
        session, ["x", "xy", "xyz"], max_new_tokens=6, tokenizer=TOKENIZER, eos_token_ids=[EOS]
    )
    assert [(r.text, r.finished) for r in results] == [("a", "eos"), ("", "eos"), ("long a", "length")]
    assert session.made == (3, 3, 5)


def test_token_ids_need_no_tokenizer() -> None:
    (result,) = generate(Script([[5, 6]]), [[1, 2]], max_new_tokens=9, eos_token_ids=[EOS])
    assert (result.tokens, result.text) == ((5, 6), "")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "MC131 there are no prompts"),
        ([""], {}, r"MC131 the prompt is empty \(0 tokens\)"),
        (["a", ""], {}, r"MC131 the prompt is empty \(0 tokens\)\n  where: prompt 2 of 2"),
        (["abcdef"], {"max_positions": 5}, "MC130 the prompt has 6 tokens, the model has 5 positions"),
        (["a"], {"max_new_tokens": 0}, "MC120 max_new_tokens is 0, it must be at least 1"),
        (["a"], {"tokenizer": None}, "MC120 texts and stop strings need a tokenizer"),
    ],
)
def test_refuses_what_cannot_be_continued(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemcompileError, match=message):
        generate(Script([[1]]), prompts, **({"max_new_tokens": 3, "tokenizer": TOKENIZER} | options))


@pytest.mark.parametrize("layers", [(Layer(), Layer()), (Layer(window=10, sinks=3, bits=8), Layer(bits=8))])
def test_greedy_generation_is_the_models_own_continuation(
    open_tiny: OpenTiny, layers: tuple[Layer, ...]
) -> None:
    model = TinyModel(layers=layers)
    prompts = [tokens_of(model, count, seed=count) for count in (40, 9)]
    results = open_tiny(model).generate(prompts, max_new_tokens=30)
    for prompt, result in zip(prompts, results, strict=True):
        logits = reference(model, [*prompt, *result.tokens])
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(result.tokens)


def test_sampled_generation_repeats_with_its_seed(open_tiny: OpenTiny) -> None:
    session = open_tiny(TinyModel())
    first, again, other = (
        session.generate([[1, 2, 3]], max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=seed))[
            0
        ].tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other
