"""Text in pieces: never half a character, never a stop string, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Tokenizers

from memcompile.artifact import ChatEntry
from memcompile.runtime.tokenizer import REPLACEMENT, StopStrings, TextStream, Tokenizer


def byte_tokenizer() -> Any:
    """One token a byte, then <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizers(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def word_tokenizer() -> Any:
    """Words joined by a space when decoded, as sentencepiece models do."""
    words = ["▁the", "▁cat", "s", "▁sat", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    tokenizer = Tokenizers(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return tokenizer


BYTES, WORDS = Tokenizer(byte_tokenizer()), Tokenizer(word_tokenizer())


@given(st.text(max_size=30))
def test_text_comes_back(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.text(max_size=30))
def test_a_stream_never_gives_half_a_character(text: str) -> None:
    stream = TextStream(BYTES)
    pieces = [stream.push(token) for token in BYTES.encode(text)]
    assert "".join(pieces) == text or REPLACEMENT in text
    for cut in range(len(pieces)):
        assert text.startswith("".join(pieces[:cut]))
    assert "".join(pieces) + stream.finish() == text


@given(st.lists(st.integers(0, 257), max_size=40))
def test_a_stream_of_any_bytes_gives_what_decoding_gives(tokens: list[int]) -> None:
    stream = TextStream(BYTES)
    assert "".join(stream.push(t) for t in tokens) + stream.finish() == BYTES.decode(tokens)


# tokens 5 to 8 are the bytes of one character
@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4], [5, 6, 7, 8]]), max_size=20))
def test_words_keep_their_spaces(pieces: list[list[int]]) -> None:
    stream, tokens = TextStream(WORDS), [token for piece in pieces for token in piece]
    assert "".join(stream.push(t) for t in tokens) + stream.finish() == WORDS.decode(tokens)


def test_a_character_that_was_given_stays_when_broken_bytes_follow() -> None:
    stream, tokens = TextStream(WORDS), [5, 6, 7, 8, 5]
    # decoding at once takes the whole run of bytes for broken
    assert WORDS.decode(tokens) == REPLACEMENT * 5
    assert [stream.push(token) for token in tokens] == ["", "", "", "😀", ""]
    assert set(stream.finish()) <= {REPLACEMENT}


def test_a_character_of_four_tokens_comes_with_the_fourth() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(token) for token in BYTES.encode("a😀b")] == ["a", "", "", "", "😀", "b"]


def test_an_incomplete_character_is_given_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.push(BYTES.encode("😀")[0]) == ""
    assert stream.finish() == REPLACEMENT
    assert stream.finish() == ""


@given(st.text("ab\n", max_size=20), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    filtered = StopStrings(stops)
    given_out = ""
    for piece in pieces:
        given_out += filtered.push(piece)
        assert not any(stop in given_out for stop in stops)
    given_out += filtered.finish()
    # the stop that is complete first in the text ends it
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert filtered.stopped == bool(ends)
    if not ends:
        assert given_out == text
    else:
        assert text.startswith(given_out)
        assert len(given_out) <= min(start for _, start in ends) + max(map(len, stops))
    assert not ends or filtered.push("more") == ""


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    filtered = StopStrings(["\nUser:"])
    assert [filtered.push(t) for t in ("Hi", "\n", "Us", "e", "d", "\nUser", ":", "x")] == [
        "Hi", "", "", "", "\nUsed", "", "", "",
    ]  # fmt: skip
    assert filtered.stopped
    assert filtered.finish() == ""


def test_the_begin_token_is_added_once() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), bos_token_id=256)
    assert tokenizer.encode("<s>") == [256]
    assert tokenizer.encode("")[:1] == [256]
    assert len(tokenizer.encode("ab")) == 3
    assert BYTES.encode("") == []


def test_a_chat_format_is_put_around_a_message() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), chat=ChatEntry("<s>", "</s>", ("</s>",)))
    assert tokenizer.encode("a", chat=True)[0] == 256
    assert tokenizer.encode("a", chat=True)[-1] == 257
    assert tokenizer.encode("a") == BYTES.encode("a")
    assert BYTES.encode("a", chat=True) == BYTES.encode("a")


@pytest.mark.parametrize("stops", [[], [""]])
def test_no_stop_string_holds_nothing_back(stops: list[str]) -> None:
    assert StopStrings(stops).push("text") == "text"
