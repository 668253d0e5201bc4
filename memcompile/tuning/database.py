"""The tuning database: one JSON file, read whole, changed by a rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from memcompile.errors import MemcompileError
from memcompile.kernels.build import cache_folder
from memcompile.tuning.records import Key, Record

FORMAT: Final = "memcompile-tuning"
VERSION: Final = 1


def default_database() -> Path:
    """`tuning.json` in the user's cache folder ($MEMCOMPILE_CACHE names another folder)."""
    return cache_folder() / "tuning.json"


@dataclass(frozen=True, slots=True)
class Database:
    """The records in a file, which need not be there yet."""

    path: Path

    @classmethod
    def at(cls, path: Path | None) -> Database:
        """The database in `path`, the user's own when None."""
        return cls(path or default_database())

    def records(self) -> dict[str, Record]:
        """All records by the digest of their key. Raises MC122 when the file is not a database."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(str(error)) from error
        try:
            found = json.loads(text)
            if found["format"] != FORMAT or found["version"] != VERSION:
                raise ValueError(f"format {found['format']!r} version {found['version']!r}")
            records = [Record.from_dict(record) for record in found["records"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unreadable(f"{type(error).__name__}: {error}") from error
        return {record.key.digest: record for record in records}

    def find(self, key: Key) -> Record | None:
        """The record of a key."""
        return self.records().get(key.digest)

    def store(self, record: Record) -> None:
        """Add a record, in place of an older one of the same key. Raises MC122 when it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # two commands may tune at once: neither loses what the other stored
            with self._alone():
                records = self.records() | {record.key.digest: record}
                self._write(list(records.values()))
        except OSError as error:
            raise self._unreadable(str(error)) from error

    def clear(self) -> int:
        """Forget everything; how many records there were. A file that is not a database is left alone."""
        count = len(self.records())
        self.path.unlink(missing_ok=True)
        return count

    def _write(self, records: list[Record]) -> None:
        document = {"format": FORMAT, "version": VERSION, "records": [r.as_dict() for r in records]}
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".partial-") as folder:
            written = Path(folder) / self.path.name
            written.write_text(text, encoding="utf-8")
            os.replace(written, self.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows: the last of two writers wins
            yield
            return
        with open(self.path.with_name(f".{self.path.name}.lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _unreadable(self, why: str) -> MemcompileError:
        return MemcompileError(
            "MC122",
            f"the tuning database cannot be used: {why}",
            where=str(self.path),
            fix="delete the file, or name another one with --database",
        )
