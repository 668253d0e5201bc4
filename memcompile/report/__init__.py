"""Reports: one document per artifact, shown as `report.json`, a terminal table and a page."""

from memcompile.report.document import SCHEMA, Document, build_document
from memcompile.report.html import REPORT_HTML, render_html, write_html
from memcompile.report.json import REPORT_JSON, read_json, write_json
from memcompile.report.tables import print_report, render
from memcompile.report.write import write_reports

__all__ = [
    "REPORT_HTML",
    "REPORT_JSON",
    "SCHEMA",
    "Document",
    "build_document",
    "print_report",
    "read_json",
    "render",
    "render_html",
    "write_html",
    "write_json",
    "write_reports",
]
