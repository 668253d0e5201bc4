"""Put a tokenizer into an artifact: its `tokenizers` file, and its chat template as text around a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memcompile.artifact import ChatEntry, TokenizerEntry

TOKENIZER_FILE = "tokenizer.json"
# a message no template changes and no text contains
_MESSAGE = "\u2063memcompile message\u2063"


def write_tokenizer(tokenizer: Any, folder: Path, eos_token_ids: tuple[int, ...]) -> TokenizerEntry | None:
    """Write the files of a transformers tokenizer into `folder`; None when there is no fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER_FILE).exists():
        backend.save(str(folder / TOKENIZER_FILE))
    bos = getattr(tokenizer, "bos_token_id", None)
    encoded = tokenizer("a").input_ids
    add_bos = bool(bos is not None and encoded and encoded[0] == bos)
    return TokenizerEntry(file=TOKENIZER_FILE, add_bos=add_bos, chat=_chat(tokenizer, eos_token_ids))


def _chat(tokenizer: Any, eos_token_ids: tuple[int, ...]) -> ChatEntry | None:
    """The template's text before and after one user message, so that running needs no template engine."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _MESSAGE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:
        # templates are programs of their own, written by strangers: one that fails here is left out
        return None
    before, found, after = str(text).partition(_MESSAGE)
    if not found:
        return None
    stops = [tokenizer.convert_ids_to_tokens(i) for i in eos_token_ids]
    eos = getattr(tokenizer, "eos_token", None)
    stop = tuple(dict.fromkeys(str(s) for s in [*stops, eos] if s))
    return ChatEntry(prefix=before, suffix=after, stop=stop)
