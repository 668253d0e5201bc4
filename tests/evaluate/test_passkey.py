"""Passkey prompts: exact length, the key at its depth, the chat template around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memcompile.artifact.manifest import ChatEntry
from memcompile.evaluate.passkey import (
    _FILLER,
    _LEAD,
    _NEEDLE,
    _OPENING,
    _QUESTION,
    build_prompt,
    passkey_fits,
)
from memcompile.evaluate.texts import TokenSource
from tests.evaluate import toy


def _source(chat: ChatEntry | None = None, *, has_tokenizer: bool = True) -> TokenSource:
    tokenizer = SimpleNamespace(add_bos=False, chat=chat) if has_tokenizer else None
    manifest = SimpleNamespace(model=SimpleNamespace(vocab_size=128, bos_token_id=None), tokenizer=tokenizer)
    session: Any = SimpleNamespace(manifest=manifest, tokenizer=toy.CharacterTokenizer())
    return TokenSource(session, None, seed=0)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_key_lies_at_its_depth_in_a_prompt_of_exact_length(depth: float) -> None:
    source = _source()
    prompt = build_prompt(source, depth=depth, tokens=2000, key="40312")
    text = source.decode(prompt.tokens)
    assert len(prompt.tokens) == 2000
    assert text.count("The pass key is 40312.") == 1
    around = [_OPENING, _NEEDLE.format(key="40312"), _QUESTION, "\n", _LEAD]
    haystack = 2000 - len("".join(around))
    # it moves back to the end of a sentence, and the longest has 24 characters
    assert -24 < prompt.needle_start - len(_OPENING) - depth * haystack <= 0.5
    assert text.startswith("There is a pass key hidden")
    assert text.endswith("What is the pass key?\nThe pass key is")
    assert source.decode(prompt.answer) == " 40312"


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_needle_begins_after_a_sentence_of_the_filler(depth: float) -> None:
    source = _source()
    prompt = build_prompt(source, depth=depth, tokens=2000, key="40312")
    assert source.decode(prompt.tokens[: prompt.needle_start]).endswith(".")
    text = source.decode(prompt.tokens).replace(_NEEDLE.format(key="40312"), "")
    assert text.removeprefix(_OPENING).startswith(_FILLER * 15)


def test_a_chat_template_goes_around_the_question() -> None:
    source = _source(ChatEntry("<user>", "</user><bot>"))
    text = source.decode(build_prompt(source, depth=0.5, tokens=1000, key="40312").tokens)
    assert text.startswith("<user>There is")
    assert text.endswith("What is the pass key?</user><bot>The pass key is")
    assert len(text) == 1000


def test_short_prompts_and_missing_tokenizers_are_left_out() -> None:
    assert passkey_fits(_source(), 1000)
    assert not passkey_fits(_source(), 200)
    assert not passkey_fits(_source(has_tokenizer=False), 1000)
