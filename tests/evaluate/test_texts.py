"""Windows of tokens: exact lengths, evenly spaced, and honest refusals."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memcompile.errors import MemcompileError
from memcompile.evaluate.texts import TokenSource, read_text, text_digest


class _Words:
    """One token a word, with a start token in front where the model wants one."""

    def __init__(self, start: list[int]) -> None:
        self.start = start

    def encode(self, text: str) -> list[int]:
        return [*self.start, *(2 + len(word) for word in text.split())]

    def decode(self, ids: list[int]) -> str:
        return " ".join("x" * (token - 2) for token in ids)


def _session(*, add_bos: bool = False, tokenizer: Any = None) -> Any:
    model = SimpleNamespace(vocab_size=50, bos_token_id=1)
    return SimpleNamespace(
        manifest=SimpleNamespace(model=model, tokenizer=SimpleNamespace(add_bos=add_bos, chat=None)),
        tokenizer=tokenizer or _Words([1] if add_bos else []),
    )


TEXT = " ".join("word" if index % 3 else "no" for index in range(3000))


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_reads_compressed_texts(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = tmp_path / f"book.txt{suffix}"
    path.write_bytes(pack("Émile".encode()))
    assert read_text(path) == "Émile"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_refuses_a_text_it_cannot_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MemcompileError) as caught:
        read_text(path)
    assert caught.value.code == "MC121"
    assert str(path) in str(caught.value)


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one", encoding="utf-8")
    first = text_digest(path)
    path.write_text("two", encoding="utf-8")
    assert text_digest(path) != first
    assert text_digest(None) == "none"


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200, 1500, 3000])
def test_windows_have_exactly_the_tokens_asked_for(tokens: int) -> None:
    source = TokenSource(_session(), TEXT, seed=0)
    for index in range(3):
        assert len(source.window(index, 3, tokens)) == tokens


def test_windows_start_with_the_start_token_only_where_the_model_wants_one() -> None:
    assert TokenSource(_session(add_bos=True), TEXT, seed=0).window(0, 1, 64)[:2] == [1, 4]
    assert TokenSource(_session(), TEXT, seed=0).window(0, 1, 64)[0] == 4


def test_windows_are_spread_from_the_start_to_the_end_of_the_text() -> None:
    text = " ".join(["a"] * 1000 + ["bb"] * 1000 + ["ccc"] * 1000)
    source = TokenSource(_session(), text, seed=0)
    means = [sum(source.window(index, 3, 100)) / 100 for index in range(3)]
    assert means == [3.0, 4.0, 5.0]


def test_refuses_a_text_shorter_than_a_window() -> None:
    with pytest.raises(MemcompileError, match="has 3000 tokens, and a window needs 3001") as caught:
        TokenSource(_session(), TEXT, seed=0).window(0, 1, 3001)
    assert caught.value.code == "MC121"


def test_random_tokens_stand_in_for_a_missing_text_and_repeat_with_the_seed() -> None:
    first, second = (TokenSource(_session(), None, seed=3) for _ in range(2))
    assert first.synthetic
    assert first.window(1, 2, 65) == second.window(1, 2, 65)
    assert first.window(0, 2, 65) != first.window(1, 2, 65)
    assert max(first.window(0, 2, 200)) < 50


def test_a_template_may_begin_with_the_start_token_of_a_model_that_adds_none() -> None:
    class Chat(_Words):
        def encode(self, text: str) -> list[int]:
            return [1 if word == "<user>" else 4 for word in text.split()]

    source = TokenSource(_session(tokenizer=Chat([])), TEXT, seed=0)
    assert source.encode("<user> word") == [1, 4]
