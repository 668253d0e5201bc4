"""`report.html`: one self-contained page, readable in light and dark, on paper and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memcompile.report.charts import Bar, Line, bar_chart, line_chart, smoothed
from memcompile.report.document import Document
from memcompile.report.measures import MEASURES
from memcompile.report.tables import crossover_lines, step_lines, step_rows

REPORT_HTML: Final = "report.html"
_ROLES: Final = {"original": "original", "rewritten": "rewritten", "hugging_face": "Hugging Face"}
_BAR_MEASURES: Final = ("state_bytes", "peak_memory_bytes", "prefill_seconds", "decode_seconds_per_token")
_LOSS_BINS: Final = 32


def write_html(document: Document, path: Path) -> None:
    """Write the page of a report document."""
    path.write_text(render_html(document), encoding="utf-8")


def render_html(document: Document) -> str:
    """Return the page of a report document."""
    environment = Environment(
        loader=PackageLoader("memcompile.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = {role: document[role] for role in _ROLES if document[role] is not None}
    return environment.get_template("page.html.j2").render(
        document=document,
        models=models,
        has_original="original" in models,
        has_hugging_face="hugging_face" in models,
        role_titles=_ROLES,
        rows=_rows(document, models),
        bars=_bars(models),
        passkey=_passkey_chart(models),
        losses=_loss_chart(models),
        crossover=_crossover_chart(document),
        crossover_lines=crossover_lines(document["crossovers"]),
        step=_step(document.get("attribution")),
        layers=region_map(document["regions"]),
        roles=_legend(document["regions"]),
        plan=json.dumps(document["plan"], indent=2, ensure_ascii=False),
    )


def region_map(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the layers in order, each with one cell per key/value head."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for region in regions:
        name = region["region"].partition(".")[0] if region["layer"] is None else str(region["layer"])
        layers.setdefault(name, []).extend([region] * int(region["kv_heads"]))
    return [{"name": name, "cells": layers[name]} for name in sorted(layers, key=_layer_order)]


def _layer_order(name: str) -> tuple[bool, int]:
    return (False, int(name)) if name.isdecimal() else (True, 0)


def _legend(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every distinct summary, with the caches and heads it stands for."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for region in regions:
        key = (region["role"], region["summary"])
        entry = found.setdefault(key, {"role": key[0], "summary": key[1], "bits": region["bits"], "heads": 0})
        entry["heads"] += int(region["kv_heads"])
    return list(found.values())


def _rows(document: Document, models: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for measure in MEASURES:
        values = {role: model.get(measure.name) for role, model in models.items()}
        if all(value is None for value in values.values()):
            continue
        row: dict[str, Any] = {"title": measure.title, "ratios": {}, "verdicts": {}}
        row["values"] = {
            role: "–" if value is None else measure.show(value) for role, value in values.items()
        }
        for role in ("original", "hugging_face"):
            ratio = (document["ratios"][f"to_{role}"] or {}).get(measure.name)
            if ratio is not None:
                row["ratios"][role] = measure.show_ratio(ratio)
                row["verdicts"][role] = measure.verdict(ratio)
        rows.append(row)
    return rows


def _step(attribution: dict[str, Any] | None) -> dict[str, Any] | None:
    if attribution is None:
        return None
    heading, *rows = step_rows(attribution)
    return {"heading": heading, "rows": rows, "lines": step_lines(attribution)}


def _bars(models: dict[str, Any]) -> list[dict[str, Any]]:
    charts = []
    for measure in MEASURES:
        if measure.name not in _BAR_MEASURES:
            continue
        bars = [
            Bar(_ROLES[role], model[measure.name], measure.show(model[measure.name]), role)
            for role, model in models.items()
            if model.get(measure.name) is not None
        ]
        if bars:
            charts.append({"title": measure.title, "chart": bar_chart(bars)})
    return charts


def _passkey_chart(models: dict[str, Any]) -> Markup | None:
    lines = [
        Line(
            _ROLES[role],
            role,
            tuple((point["depth"], point["logprob"]) for point in model["passkey"]),
            tuple(not point["correct"] for point in model["passkey"]),
        )
        for role, model in models.items()
        if model["passkey"]
    ]
    if not lines:
        return None
    return line_chart(
        lines, x_title="depth of the key in the prompt", y_title="log-probability per token", x_text=_depth
    )


def _depth(value: float) -> str:
    return f"{value:.0%}"


def _loss_chart(models: dict[str, Any]) -> Markup | None:
    lines = []
    for role, model in models.items():
        losses, windows = model["token_losses"], model["windows"]
        if not losses or not windows:
            continue
        length = len(losses) // windows
        per_window = [losses[index * length : (index + 1) * length] for index in range(windows)]
        points = smoothed(per_window, max(1, length // _LOSS_BINS))
        lines.append(Line(_ROLES[role], role, points, marked=False))
    if not lines:
        return None
    return line_chart(lines, x_title="tokens after the prompt", y_title="loss, nats per token")


def _crossover_chart(document: Document) -> Markup | None:
    titles = {"prefill": "first", "decode": "second", "request": "third"}
    lines = [
        Line(
            found["quantity"],
            titles.get(found["quantity"], "first"),
            tuple((point["prompt_tokens"], point["speedup"]) for point in found["measured"]),
        )
        for found in document["crossovers"]
        if found["measured"]
    ]
    if not lines:
        return None
    return line_chart(lines, x_title="prompt tokens", y_title="speedup over the original", baseline=1.0)
