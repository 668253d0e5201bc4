"""What an evaluation measures, how much of it, and how the models are opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RUNTIME_OPENER: Final = "memcompile.runtime:load"
HUGGING_FACE_OPENER: Final = "memcompile.evaluate.huggingface:load"
QUICK_DEPTHS: Final = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """The protocol's numbers; docs/concepts/evaluation.md says what each one does.

    `text` is the held-out text (plain, .gz, .xz or .bz2); without one, or without a tokenizer, seeded random
    tokens take its place; without a tokenizer, passkey retrieval is left out. `text_tokens` bounds the tokens
    that perplexity and KL may read. `opener` is the "module:function" that opens an artifact in the worker
    process.
    """

    prompt_tokens: int = 4000
    new_tokens: int = 256
    batch: int = 1
    text: Path | None = None
    text_tokens: int | None = None
    windows: int = 2
    continuation_tokens: int = 512
    passkey_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    decode_tokens: int = 64
    cost_repeats: int = 1
    crossover: bool = False
    threads: int | None = None
    seed: int = 20260
    opener: str = RUNTIME_OPENER

    def quick(self) -> EvaluationSettings:
        """Return the short protocol: one window, three depths, 32 timed tokens, no crossover."""
        return dataclasses.replace(
            self,
            windows=1,
            continuation_tokens=min(self.continuation_tokens, 256),
            passkey_depths=QUICK_DEPTHS if self.passkey_depths else (),
            decode_tokens=min(self.decode_tokens, 32),
            crossover=False,
        )

    def windows_in_budget(self) -> int:
        """Return how many windows of prompt + continuation the text budget pays for: at least one."""
        if self.text_tokens is None:
            return self.windows
        window_tokens = self.prompt_tokens + self.continuation_tokens
        return max(1, min(self.windows, self.text_tokens // window_tokens))

    def as_dict(self) -> dict[str, Any]:
        """The settings as the report prints them."""
        values = dataclasses.asdict(self)
        values["text"] = self.text.name if self.text is not None else None
        values["passkey_depths"] = list(self.passkey_depths)
        return values
