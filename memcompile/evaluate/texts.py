"""Where the tokens of an evaluation come from: a held-out text, or seeded random tokens without one."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from pathlib import Path
from typing import Any, Final

import numpy as np

from memcompile.errors import MemcompileError

_OPENERS: Final[dict[str, Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_SAMPLE_CHARACTERS: Final = 4000


def read_text(path: Path) -> str:
    """Read a UTF-8 text, decompressing .gz, .xz and .bz2. Raises MC121 when it cannot be read."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            text: str = stream.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as problem:
        raise MemcompileError(
            "MC121",
            f"the evaluation text cannot be read: {problem}",
            where=str(path),
            fix="give a UTF-8 text",
        ) from problem
    return text


def text_digest(path: Path | None) -> str:
    """Return the sha256 of a text file's bytes; "none" without a text."""
    if path is None:
        return "none"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as problem:
        raise MemcompileError(
            "MC121", f"the evaluation text cannot be read: {problem}", where=str(path), fix="check the path"
        ) from problem


class TokenSource:
    """Cuts token windows out of a text, tokenising only the characters it needs."""

    def __init__(self, session: Any, text: str | None, *, seed: int) -> None:
        tokenizer_facts = getattr(session.manifest, "tokenizer", None)
        self._tokenizer: Any = session.tokenizer if tokenizer_facts is not None else None
        self._text = text
        self._seed = seed
        self._vocab_size = int(session.manifest.model.vocab_size)
        self._bos = session.manifest.model.bos_token_id
        self._add_bos = tokenizer_facts is not None and tokenizer_facts.add_bos and self._bos is not None
        self.chat = tokenizer_facts.chat if tokenizer_facts is not None else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be made tokens."""
        return self._tokenizer is not None

    @property
    def synthetic(self) -> bool:
        """Whether windows are random tokens because there is no text or no tokenizer."""
        return self._text is None or self._tokenizer is None

    @property
    def start_ids(self) -> list[int]:
        """The tokens every sequence of this model starts with."""
        return [int(self._bos)] if self._add_bos else []

    def encode(self, text: str) -> list[int]:
        """Tokenise without the tokens a sequence starts with."""
        ids = [int(token) for token in self._tokenizer.encode(text)]
        return ids[1:] if self._add_bos and ids[:1] == self.start_ids else ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(ids))

    def window(self, index: int, of: int, tokens: int) -> list[int]:
        """Return window `index` of `of` evenly spaced ones, `tokens` long, start tokens included.

        Raises MC121 when the text has fewer tokens.
        """
        if self.synthetic:
            return self._random(index, tokens)
        start_ids = self.start_ids
        body = self.passage(index, of, tokens - len(start_ids))
        return start_ids + body

    def passage(self, index: int, of: int, tokens: int) -> list[int]:
        """Return `tokens` tokens of running text, without start tokens."""
        text = self._text or ""
        sample = self.encode(text[:_SAMPLE_CHARACTERS])
        if not sample:
            raise MemcompileError(
                "MC121",
                "the evaluation text is empty",
                where="data.evaluation.text",
                fix="give a file of running text with at least workload.prompt_tokens tokens",
            )
        per_token = min(len(text), _SAMPLE_CHARACTERS) / len(sample)
        # a quarter more than the estimate: passages differ in characters per token
        span = int(tokens * per_token * 1.25) + 64
        start = int((len(text) - span) * index / max(of - 1, 1)) if len(text) > span else 0
        if start:
            start = text.find(" ", start, start + 200) + 1 or start
        while True:
            ids = self.encode(text[start : start + span])
            if len(ids) >= tokens:
                return ids[:tokens]
            if start == 0 and span >= len(text):
                raise MemcompileError(
                    "MC121",
                    f"the evaluation text has {len(ids)} tokens, and a window needs {tokens}",
                    where="data.evaluation.text",
                    fix="give a longer text or lower workload.prompt_tokens",
                )
            span = int(span * 1.5)
            start = max(0, min(start, len(text) - span))

    def _random(self, index: int, tokens: int) -> list[int]:
        generator = np.random.default_rng(self._seed + index)
        return [int(token) for token in generator.integers(0, self._vocab_size, tokens)]
