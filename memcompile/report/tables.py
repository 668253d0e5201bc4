"""The report in the terminal: models side by side, gates below."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memcompile.evaluate.units import format_bytes, format_ratio, format_seconds
from memcompile.report.document import Document
from memcompile.report.measures import MEASURES, Measure

_STYLES = {"better": "green", "worse": "red", "same": ""}


def print_report(document: Document, console: Console | None = None) -> None:
    """Print the comparison, the gates, the crossovers and the notes."""
    (console or Console()).print(render(document))


def render(document: Document) -> RenderableType:
    """Return everything `print_report` prints."""
    parts: list[RenderableType] = []
    if document["rewritten"] is not None:
        parts.append(comparison_table(document))
    # a report that an older version wrote has none
    if (attribution := document.get("attribution")) is not None:
        parts.append(step_table(attribution))
        parts += [Text(line, style="dim") for line in step_lines(attribution)]
    if document["gates"]:
        parts.append(gates_table(document["gates"]))
    parts += [Text(line, style="dim") for line in crossover_lines(document["crossovers"])]
    parts += [Text(f"note: {note}", style="yellow") for note in document["notes"]]
    return Group(*parts)


def comparison_table(document: Document) -> Table:
    """One row per measure that any model has: original, rewritten, ratio, and Hugging Face with its ratio."""
    settings = document["settings"] or {}
    table = _table(_title(document, settings))
    table.add_column("")
    original, hugging_face = document["original"], document["hugging_face"]
    if original is not None:
        table.add_column("original", justify="right")
    table.add_column("rewritten", justify="right", style="bold")
    if original is not None:
        table.add_column("ratio", justify="right")
    if hugging_face is not None:
        table.add_column("Hugging Face", justify="right")
        table.add_column("ratio", justify="right")
    models = [model for model in (original, document["rewritten"], hugging_face) if model is not None]
    for measure in MEASURES:
        if all(model.get(measure.name) is None for model in models):
            continue
        cells: list[str | Text] = [measure.title]
        if original is not None:
            cells.append(_value(measure, original))
        cells.append(_value(measure, document["rewritten"]))
        if original is not None:
            cells.append(_ratio(measure, document["ratios"]["to_original"]))
        if hugging_face is not None:
            cells += [_value(measure, hugging_face), _ratio(measure, document["ratios"]["to_hugging_face"])]
        table.add_row(*cells)
    return table


def gates_table(gates: list[dict[str, Any]]) -> Table:
    """One row per limit: wanted, got, and whether it holds."""
    table = _table("gates")
    for column in ("gate", "wanted", "got", ""):
        table.add_column(column)
    for gate in gates:
        verdict = Text("met", style="green") if gate["passed"] else Text("NOT MET", style="bold red")
        table.add_row(gate["name"], gate["wanted_text"], gate["got_text"], verdict)
    return table


def step_table(attribution: dict[str, Any]) -> Table:
    """One row per part of a decode step and their sum: bytes and time of each model."""
    heading, *rows = step_rows(attribution)
    table = _table("where a token goes")
    for column in heading:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def step_rows(attribution: dict[str, Any]) -> list[list[str]]:
    """A heading, then bytes and time of weights, state, activations and the whole step."""
    roles = [role for role in ("original", "rewritten") if attribution[role] is not None]
    rows = [["", *(f"{role}{unit}" for role in roles for unit in (", bytes", ", time"))]]
    for part in ("weights", "state", "activations", "in all"):
        row = [part]
        for role in roles:
            sizes, times = attribution[role]["bytes"], attribution[role]["seconds"]
            whole = part == "in all"
            size = sum(sizes.values()) if whole else sizes[part]
            seconds = sum(times.values()) if whole else times[part]
            row += [format_bytes(size), format_seconds(seconds)]
        rows.append(row)
    return rows


def step_lines(attribution: dict[str, Any]) -> list[str]:
    """What bytes predicted and what was measured, in sentences."""
    lines = [f"predicted before measuring: {attribution['bound']}"]
    reached = [
        f"{attribution[role]['bytes_per_second'] / 1e9:.1f} GB/s ({role})"
        for role in ("original", "rewritten")
        if attribution[role] is not None
    ]
    lines.append(f"reached: {', '.join(reached)}; time is shared out by bytes")
    if attribution["predicted_speedup"] is not None:
        predicted, measured = (attribution[f"{name}_speedup"] for name in ("predicted", "measured"))
        by_bytes = f"a token should be {format_ratio(predicted)} as fast by its bytes"
        lines.append(f"{by_bytes}, and is {format_ratio(measured)}")
    return lines


def crossover_lines(crossovers: list[dict[str, Any]]) -> list[str]:
    """Say from which prompt length on the rewritten model is faster."""
    titles = {"prefill": "time to first token", "decode": "time per token", "request": "a whole request"}
    lines = []
    for found in crossovers:
        title = titles.get(found["quantity"], found["quantity"])
        if found["tokens"] is None:
            lines.append(f"{title}: not faster than the original at the longest prompt measured")
        elif found["tokens"] == 0:
            lines.append(f"{title}: at least as fast as the original at every length measured")
        else:
            lines.append(f"{title}: slower than the original below about {found['tokens']} prompt tokens")
    return lines


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _title(document: Document, settings: dict[str, Any]) -> str:
    target = document["target"]
    where = f"{target['backend']} {target['device']}, {target['threads'] or 'all'} threads"
    prompt = f", {settings['prompt_tokens']} prompt tokens" if settings else ""
    batch = f", batch {settings['batch']}" if settings and settings["batch"] > 1 else ""
    return f"{document['model']['family']}, {document['model']['dtype']}, {where}{prompt}{batch}"


def _value(measure: Measure, metrics: dict[str, Any]) -> str:
    value = metrics.get(measure.name)
    return "–" if value is None else measure.show(value)


def _ratio(measure: Measure, ratios: dict[str, float] | None) -> Text:
    ratio = (ratios or {}).get(measure.name)
    if ratio is None:
        return Text("")
    return Text(measure.show_ratio(ratio), style=_STYLES[measure.verdict(ratio)])
