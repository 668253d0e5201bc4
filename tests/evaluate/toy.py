"""A language model of 128 characters that copies: a session without any runtime, for tests of the protocol.

It predicts what followed the last eight characters the last time they stood in its state, and falls back on a
seeded table of pairs. An artifact's `toy.json` says how many characters `compress` keeps and how sharp it is.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memcompile.artifact import StepBytes
from memcompile.artifact.manifest import (
    EvictEntry,
    FunctionEntry,
    GroupEntry,
    Manifest,
    ModelEntry,
    StateEntry,
    TensorEntry,
    TokenizerEntry,
    read_manifest,
)
from memcompile.errors import MemcompileError

VOCABULARY = 128
CONTEXT = 8
OPENER = "tests.evaluate.toy:load"


class CharacterTokenizer:
    """One token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) % VOCABULARY for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class ToyState:
    """What the model remembers, as bytes, and how many it has room for."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.rows = [b""] * batch
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.capacity * 2 * 4


class ToySession:
    """The session interface over the copying model."""

    def __init__(self, manifest: Manifest, facts: dict[str, Any]) -> None:
        self.manifest = manifest
        self.tokenizer = CharacterTokenizer() if manifest.tokenizer else None
        self._keep = facts.get("keep")
        self._sharpness = float(facts.get("sharpness", 8.0))
        self._pairs = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)
        self._new_tokens = 0

    def new_state(self, batch: int, prompt_tokens: int, new_tokens: int) -> ToyState:
        self._new_tokens = new_tokens
        return ToyState(batch, prompt_tokens + new_tokens)

    def prefill(self, state: ToyState, rows: list[list[int]]) -> list[NDArray[np.float32]]:
        state.rows = [bytes(row) for row in rows]
        return [self._logits(row)[None] for row in state.rows]

    def compress(self, state: ToyState) -> None:
        if self._keep is not None:
            state.rows = [row[-self._keep :] for row in state.rows]
            state.capacity = self._keep + self._new_tokens

    def decode(self, state: ToyState, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        state.rows = [row + bytes([int(token)]) for row, token in zip(state.rows, tokens, strict=True)]
        return np.stack([self._logits(row) for row in state.rows])

    def extend(self, state: ToyState, tokens: list[int]) -> NDArray[np.float32]:
        return np.concatenate([self.decode(state, np.array([token])) for token in tokens])

    def forward(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"hidden": self._pairs[feeds["input_ids"]] * self._sharpness}

    def _logits(self, row: bytes) -> NDArray[np.float32]:
        logits = self._pairs[row[-1]].copy()
        seen = row.rfind(row[-CONTEXT:], 0, len(row) - 1)
        if seen >= 0:
            logits[row[seen + CONTEXT]] += self._sharpness
        return logits


def load(path: str, *, threads: int | None = None) -> ToySession:
    """Open a toy artifact; `toy.json` may ask for a failure."""
    del threads
    facts = json.loads((Path(path) / "toy.json").read_text(encoding="utf-8"))
    print("a runtime may print what it likes")
    log = facts.get("log")
    if log:
        with Path(log).open("a", encoding="utf-8") as stream:
            stream.write(f"{path}\n")
    if facts.get("fail") == "error":
        raise MemcompileError("MC503", "model.onnx changed", where=path, fix="copy it again")
    if facts.get("fail") == "crash":
        raise ValueError("the toy broke")
    if facts.get("fail") == "kill":
        os.kill(os.getpid(), 9)
    return ToySession(read_manifest(Path(path)), facts)


def write_toy(folder: Path, *, causal: bool = True, tokenizer: bool = True, **facts: Any) -> Path:
    """Write a toy artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = facts.get("keep")
    tokens = TensorEntry("input_ids", "int64", ("batch", "tokens"))
    names = ("attention_mask", "past_key_values.0.key", "past_key_values.0.value")
    past = tuple(TensorEntry(name, "float32", ("batch", 1, "slots", 1)) for name in names)
    present = tuple(
        TensorEntry(name, "float32", ()) for name in ("logits", "present.0.key", "present.0.value")
    )
    hidden = (TensorEntry("hidden", "float32", ("batch", "tokens", VOCABULARY)),)
    state = StateEntry("0", "full", 1, 1, names[1], names[2], "present.0.key", "present.0.value", heads=1)
    evict = EvictEntry(keep_tokens=keep) if keep is not None else None
    manifest = Manifest(
        backend="toy",
        model=ModelEntry("toy", vocab_size=VOCABULARY, max_positions=4096, causal=causal, layers=1),
        functions={
            "step": FunctionEntry("toy.json", (tokens, *past), present),
        }
        if causal
        else {"forward": FunctionEntry("toy.json", (tokens,), hidden)},
        states=(state,) if causal else (),
        groups=(GroupEntry("full", "attention_mask", evict=evict),) if causal else (),
        tokenizer=TokenizerEntry("toy.json") if tokenizer else None,
        step_bytes=StepBytes(VOCABULARY * 4, 0, 8) if causal else None,
        plan={"sharpness": facts.get("sharpness", 8.0)},
        decisions=(facts,),
    )
    (folder / "toy.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "manifest.json").write_text(manifest.as_json(), encoding="utf-8")
    return folder


def write_book(path: Path, *, characters: int = 20_000, seed: int = 5) -> Path:
    """Write sentences of sixty random words, so that what was said before says what comes."""
    path.write_text(_book(characters, seed), encoding="utf-8")
    return path


@functools.cache
def _book(characters: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    known = ["".join(generator.choice(letters, generator.integers(2, 9))) for _ in range(60)]
    words = [
        str(generator.choice(known)) + ("." if generator.random() < 0.1 else "") for _ in range(characters)
    ]
    return " ".join(words)[:characters]
