"""Text to tokens and back, with the `tokenizers` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcompile.artifact import Artifact, ChatEntry
from memcompile.errors import MemcompileError

# What a decoder writes for bytes that are not (or not yet) a character.
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The artifact's tokenizer: `encode` adds the begin token only where the model was trained with one."""

    def __init__(
        self, tokenizer: Any, *, bos_token_id: int | None = None, chat: ChatEntry | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._bos = [] if bos_token_id is None else [bos_token_id]
        self.chat = chat

    @classmethod
    def open(cls, artifact: Artifact) -> Tokenizer:
        """Read the tokenizer an artifact carries.

        Raises MC506 when there is none or it cannot be read, MC510 when `tokenizers` is not installed.
        """
        entry = artifact.manifest.tokenizer
        if entry is None:
            raise MemcompileError(
                "MC506", "the artifact has no tokenizer", where=str(artifact.path),
                fix="give token ids instead of text",
            )  # fmt: skip
        try:
            from tokenizers import Tokenizer as Tokenizers
        except ImportError as error:
            raise MemcompileError(
                "MC510", "the package tokenizers is not installed", fix="pip install tokenizers"
            ) from error
        path = artifact.file(entry.file)
        try:
            tokenizer = Tokenizers.from_file(str(path))
        except Exception as error:
            raise MemcompileError(
                "MC506", f"{entry.file} is not a tokenizer: {error}", where=str(path),
                fix="upgrade the package tokenizers, or copy the file again; token ids work without it",
            ) from error  # fmt: skip
        tokenizer.no_padding()
        tokenizer.no_truncation()
        bos = artifact.manifest.model.bos_token_id if entry.add_bos else None
        return cls(tokenizer, bos_token_id=bos, chat=entry.chat)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a text; with `chat` as a user's message, in the model's own format when it has one."""
        if chat and self.chat is not None:
            text = f"{self.chat.prefix}{text}{self.chat.suffix}"
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return ids if ids[:1] == self._bos else self._bos + ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Text of tokens as they come: `push` gives what has become certain, never half a character.

    All pieces and `finish` together are the text of all tokens. Only where a tokenizer takes a whole run of
    bytes for broken because its end is, characters that were given out before that end stay given.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # tokens from `_context` on are decoded together, so that a tokenizer's joining of words is seen;
        # the text of those before `_given` has been given out
        self._context = 0
        self._given = 0

    def push(self, token: int) -> str:
        """Add a token; returns new text, empty while a character is incomplete."""
        self._ids.append(token)
        text = self._rest()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text

    def finish(self) -> str:
        """The text still held back; an incomplete character is given as the replacement character."""
        text = self._rest()
        self._context = self._given = len(self._ids)
        return text

    def _rest(self) -> str:
        old = self._tokenizer.decode(self._ids[self._context : self._given])
        return str(self._tokenizer.decode(self._ids[self._context :])[len(old) :])


class StopStrings:
    """Passes text through until a stop string is complete, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what cannot be the beginning of a stop string. Nothing follows a stop."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
            return given
        hold = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - hold
        given, self._held = self._held[:cut], self._held[cut:]
        return given

    def finish(self) -> str:
        """The text held back in case a stop string would follow."""
        given, self._held = self._held, ""
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
