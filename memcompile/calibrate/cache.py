"""The calibration cache: a folder for each measurement, named by the digest of everything it depends on.

Every window's statistics are written as soon as they are known, to a temporary name that is then renamed,
so a measurement that was interrupted goes on where it stopped and never reads half a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def default_cache_folder() -> Path:
    """`$MEMCOMPILE_CACHE`, else `$XDG_CACHE_HOME/memcompile`, else `~/.cache/memcompile`."""
    if own := os.environ.get("MEMCOMPILE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "memcompile"
    return Path.home() / ".cache" / "memcompile"


@dataclass(frozen=True, slots=True)
class MeasurementCache:
    """The stored windows of one measurement."""

    folder: Path

    @classmethod
    def at(cls, root: Path | None, digest: str) -> MeasurementCache:
        """The cache of the measurement with `digest` below `root` (the default folder when None)."""
        return cls((root or default_cache_folder()) / "calibration" / digest)

    def load(self, window: int) -> dict[str, torch.Tensor] | None:
        """The statistics of a window; None when they were never stored, or the file is damaged."""
        path = self._path(window)
        if not path.exists():
            return None
        try:
            tensors: dict[str, torch.Tensor] = load_file(path)
        except (SafetensorError, OSError):
            # a damaged file costs one window's measurement, not the whole command
            path.unlink(missing_ok=True)
            return None
        return tensors

    def store(self, window: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store the statistics of a window."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".partial-") as partial:
            written = Path(partial) / "window.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written)
            os.replace(written, self._path(window))

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write down, for people, what the measurement is of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".partial-") as partial:
            written = Path(partial) / "measurement.json"
            written.write_text(json.dumps(dict(facts), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(written, self.folder / "measurement.json")

    def _path(self, window: int) -> Path:
        return self.folder / f"window-{window:06d}.safetensors"
