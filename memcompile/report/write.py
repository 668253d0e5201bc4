"""Write both reports into an artifact directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from memcompile.artifact.manifest import Manifest
from memcompile.evaluate import Evaluation, GateResult
from memcompile.report.document import Document, build_document
from memcompile.report.html import REPORT_HTML, write_html
from memcompile.report.json import REPORT_JSON, write_json


def write_reports(
    directory: Path,
    manifest: Manifest,
    evaluation: Evaluation | None,
    gates: Iterable[GateResult],
    *,
    name: str | None = None,
) -> Document:
    """Write `report.json` and `report.html`, and return the document that both show.

    `name` is what the artifact is called when `directory` is still a temporary one.
    """
    document = build_document(manifest, evaluation, gates, name=name or directory.name)
    write_json(document, directory / REPORT_JSON)
    write_html(document, directory / REPORT_HTML)
    return document
