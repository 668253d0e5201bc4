"""Time, memory and outputs of a model that is called once: an encoder, a vision model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memcompile.evaluate.cost import Update
from memcompile.evaluate.memory import peak_memory_bytes


def seeded_feeds(session: Any, *, tokens: int, batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Return inputs that fit the forward function: seeded tokens or numbers, masks that hide nothing."""
    generator = np.random.default_rng(seed)
    vocab_size = int(session.manifest.model.vocab_size or 2)
    feeds: dict[str, NDArray[Any]] = {}
    for tensor in session.manifest.functions["forward"].inputs:
        shape = [_extent(dim, axis, tokens=tokens, batch=batch) for axis, dim in enumerate(tensor.dims)]
        kind = np.dtype(str(tensor.dtype))
        if "mask" in tensor.name:
            feeds[tensor.name] = np.ones(shape, dtype=kind)
        elif "position" in tensor.name:
            feeds[tensor.name] = np.broadcast_to(np.arange(shape[-1], dtype=kind), shape).copy()
        elif "token_type" in tensor.name:
            feeds[tensor.name] = np.zeros(shape, dtype=kind)
        elif kind.kind in "iu":
            feeds[tensor.name] = generator.integers(0, vocab_size, shape).astype(kind)
        else:
            feeds[tensor.name] = generator.standard_normal(shape).astype(kind)
    return feeds


def _extent(dim: int | str, axis: int, *, tokens: int, batch: int) -> int:
    """A fixed size as it is; the first axis, when open, is the batch and every other one the tokens."""
    if isinstance(dim, int):
        return dim
    return batch if axis == 0 else tokens


def measure_forward(session: Any, parameters: dict[str, Any], update: Update) -> dict[str, Any]:
    """Call forward `repeats` times on seeded inputs; save the outputs, or compare them with saved ones."""
    feeds = seeded_feeds(
        session,
        tokens=int(parameters["prompt_tokens"]),
        batch=int(parameters["batch"]),
        seed=int(parameters["seed"]),
    )
    seconds: list[float] = []
    outputs: dict[str, NDArray[Any]] = {}
    repeats = max(1, int(parameters.get("repeats", 1)))
    for index in range(repeats):
        begun = time.perf_counter()
        outputs = dict(session.forward(feeds))
        seconds.append(time.perf_counter() - begun)
        update(index + 1, repeats)
    result: dict[str, Any] = {
        "prompt_tokens": int(parameters["prompt_tokens"]),
        "prefill_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if parameters.get("save_to"):
        np.savez(Path(parameters["save_to"]), *outputs.values())
    if parameters.get("compare_to"):
        saved = Path(parameters["compare_to"])
        result["output_difference"] = _largest_difference(saved, list(outputs.values()))
    return result


def _largest_difference(saved: Path, outputs: list[NDArray[Any]]) -> float:
    """Largest absolute difference, relative to the original's largest value; NaN when shapes differ."""
    largest = 0.0
    with np.load(saved, allow_pickle=False) as originals:
        if len(originals.files) != len(outputs):
            return float("nan")
        for name, value in zip(originals.files, outputs, strict=True):
            original = originals[name]
            if original.shape != value.shape:
                return float("nan")
            scale = float(np.abs(original).max(initial=0.0)) or 1.0
            largest = max(largest, float(np.abs(original - value).max(initial=0.0)) / scale)
    return largest
