"""Passkey prompts: exact length, the key at its depth, the chat template around them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memcompile.artifact.manifest import ChatEntry
from memcompile.evaluate.passkey import build_prompt, passkey_fits
from memcompile.evaluate.texts import TokenSource, read_text
from tests.evaluate import toy


def _source(tmp_path: Path, chat: ChatEntry | None = None, *, text: bool = True) -> TokenSource:
    tokenizer = SimpleNamespace(add_bos=False, chat=chat)
    manifest = SimpleNamespace(model=SimpleNamespace(vocab_size=128, bos_token_id=None), tokenizer=tokenizer)
    session: Any = SimpleNamespace(manifest=manifest, tokenizer=toy.CharacterTokenizer())
    book = read_text(toy.write_book(tmp_path / "book.txt")) if text else None
    return TokenSource(session, book, seed=0)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_key_lies_at_its_depth_in_a_prompt_of_exact_length(tmp_path: Path, depth: float) -> None:
    source = _source(tmp_path)
    prompt = build_prompt(source, depth=depth, index=1, of=3, tokens=2000, key="40312")
    text = source.decode(prompt.tokens)
    assert len(prompt.tokens) == 2000
    assert text.count("The pass key is 40312.") == 1
    # it moves back to the end of a sentence, up to 120 tokens
    assert depth * 1700 - 140 < prompt.needle_start < depth * 1900 + 80
    assert text.startswith("There is a pass key hidden")
    assert text.endswith("What is the pass key?\nThe pass key is")
    assert source.decode(prompt.answer) == " 40312"


def test_the_needle_begins_after_a_sentence(tmp_path: Path) -> None:
    source = _source(tmp_path)
    prompt = build_prompt(source, depth=0.5, index=0, of=1, tokens=2000, key="40312")
    assert source.decode(prompt.tokens[: prompt.needle_start]).endswith(".")


def test_a_chat_template_goes_around_the_question(tmp_path: Path) -> None:
    source = _source(tmp_path, ChatEntry("<user>", "</user><bot>"))
    text = source.decode(build_prompt(source, depth=0.5, index=0, of=1, tokens=1000, key="40312").tokens)
    assert text.startswith("<user>There is")
    assert text.endswith("What is the pass key?</user><bot>The pass key is")
    assert len(text) == 1000


def test_short_prompts_and_missing_texts_are_left_out(tmp_path: Path) -> None:
    assert passkey_fits(_source(tmp_path), 1000)
    assert not passkey_fits(_source(tmp_path), 200)
    assert not passkey_fits(_source(tmp_path, text=False), 1000)
