"""`report.json`: the report document, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from memcompile.errors import MemcompileError
from memcompile.report.document import SCHEMA, Document

REPORT_JSON: Final = "report.json"


def write_json(document: Document, path: Path) -> None:
    """Write the document; a value that is not JSON is a bug, never a NaN in the file."""
    path.write_text(
        json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_json(path: Path) -> Document:
    """Read a document back. Raises MC501 (none there), MC502 (a newer schema), MC505 (not a report)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise MemcompileError(
            "MC501",
            f"there is no report at {path}",
            where=str(path),
            fix="run `memcompile eval` on the artifact",
        ) from problem
    except (OSError, ValueError) as problem:
        raise MemcompileError(
            "MC505",
            f"the report cannot be read: {problem}",
            where=str(path),
            fix="write it again: run `memcompile eval` on the artifact",
        ) from problem
    if not isinstance(document, dict) or document.get("kind") != "memcompile-report":
        raise MemcompileError(
            "MC505",
            "the file is not a memcompile report",
            where=str(path),
            fix=f"give a {REPORT_JSON} that `memcompile optimize` or `memcompile eval` wrote",
        )
    schema = document.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise MemcompileError(
            "MC502",
            f"the report has schema {schema}, this memcompile reads up to {SCHEMA}",
            where=str(path),
            fix="upgrade memcompile",
        )
    return document
