"""The document is JSON, the table shows it, the page shows all of it without a network."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memcompile.errors import MemcompileError
from memcompile.report import build_document, read_json, render, render_html, write_reports
from memcompile.report.charts import smoothed, ticks
from memcompile.report.document import plain
from memcompile.report.html import region_map
from memcompile.report.measures import MEASURES
from tests.report import sample

VOID = {"meta", "br", "link", "img", "input"}


def _document(**models: bool) -> dict[str, Any]:
    measured = sample.evaluation(**models)
    return build_document(sample.manifest(), measured, sample.gates(measured), name="out")


def _text(document: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(document))
    return console.export_text()


class _Balance(HTMLParser):
    """Checks that every element is closed, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_the_document_is_json_and_comes_back_from_disk(tmp_path: Path) -> None:
    measured = sample.evaluation()
    document = write_reports(tmp_path, sample.manifest(), measured, sample.gates(measured), name="out")
    assert read_json(tmp_path / "report.json") == document
    assert document["schema"] == 1
    assert document["artifact"] == "out"
    assert [gate["passed"] for gate in document["gates"]] == [True, False, True, True]
    for name in ("perplexity", "passkey_accuracy", "prefill_seconds", "peak_memory_bytes", "state_bytes"):
        assert document["original"][name] is not None
        assert document["rewritten"][name] is not None
    assert document["ratios"]["to_original"]["state_bytes"] == pytest.approx(14_745_600 / 380_436_480)
    assert document["ratios"]["to_hugging_face"]["decode_seconds_per_token"] == pytest.approx(0.052 / 0.204)


def test_values_that_are_not_json_become_null_or_text() -> None:
    assert plain({"a": (math.nan, 1.5), "b": Path("x"), 3: None}) == {"a": [None, 1.5], "b": "x", "3": None}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "MC501"),
        ("{", "MC505"),
        ("[]", "MC505"),
        ('{"kind": "memcompile-report", "schema": 2}', "MC502"),
    ],
)
def test_refuses_what_is_not_a_report(tmp_path: Path, content: str | None, code: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MemcompileError) as caught:
        read_json(path)
    assert caught.value.code == code


def test_regions_say_what_each_cache_keeps() -> None:
    regions = {region["region"]: region for region in _document()["regions"]}
    assert regions["0"]["summary"] == "every token, float32"
    assert regions["3"]["summary"] == "keeps 1024 tokens, int8"
    assert regions["4"]["summary"] == "window 512, 4 sinks, int8"
    assert regions["5.window"]["layer"] == 5
    assert [regions[name]["role"] for name in ("0", "3", "4")] == ["full", "evict", "window"]


def test_the_region_map_has_a_cell_per_head_also_where_heads_were_split() -> None:
    layers = region_map(_document()["regions"])
    assert [layer["name"] for layer in layers] == [str(layer) for layer in range(sample.LAYERS)]
    assert all(len(layer["cells"]) == 3 for layer in layers)
    assert [cell["role"] for cell in layers[5]["cells"]] == ["full", "window", "window"]


def test_the_table_puts_models_side_by_side_with_gates_below() -> None:
    text = _text(_document())
    for words in (
        "original",
        "rewritten",
        "Hugging Face",
        "362.8 MiB",
        "14.1 MiB",
        "0.039x",
        "151 ms",
        "52 ms",
    ):
        assert words in text
    assert re.search(r"passkey\s.*accuracy at least 90%.*80%.*NOT MET", text)
    assert "time per token: slower than the original below about 1600 prompt tokens" in text
    assert "note: the text budget pays for 2 of 4 windows" in text


def test_the_table_leaves_out_models_that_were_not_measured() -> None:
    text = _text(_document(original=False, hugging_face=False))
    assert "Hugging Face" not in text
    assert "ratio" not in text
    assert "NOT MET" in text
    assert "not measured" in text


def test_table_and_page_say_where_a_token_goes() -> None:
    document = _document()
    text, page = _text(document), render_html(document)
    assert re.search(r"weights\s+513.1 MiB\s+88.3 ms\s+513.1 MiB\s+50.5 ms", text)
    assert re.search(r"in all\s+877.3 MiB\s+151 ms\s+528.6 MiB\s+52 ms", text)
    for words in (
        "redicted before measuring: weights are 58% of the bytes of a decode step and the cache 41%",
        "eached: 6.1 GB/s (original), 10.7 GB/s (rewritten)",
        " token should be 1.66x as fast by its bytes, and is 2.90x",
    ):
        assert words in re.sub(r"\s+", " ", text)
        assert words in page


def test_a_report_of_before_attributions_still_shows() -> None:
    document = _document()
    del document["attribution"]
    assert "where a token goes" not in _text(document)
    assert "Where a token goes" not in render_html(document)


def test_a_report_without_an_evaluation_still_shows_the_plan() -> None:
    document = build_document(sample.manifest(), None, [], name="out")
    assert document["rewritten"] is None
    assert _text(document).strip() == ""
    assert "snapkv" in render_html(document)


@pytest.mark.parametrize("models", [{}, {"original": False}, {"hugging_face": False}])
def test_the_page_is_whole_and_fetches_nothing(models: dict[str, bool]) -> None:
    page = render_html(_document(**models))
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    assert "script" not in parser.seen
    assert "url(" not in page
    assert "@import" not in page
    assert len(page) < 200_000
    assert parser.seen.count("svg") >= 6


def test_the_page_shows_gates_charts_map_refusals_and_plan() -> None:
    page = render_html(_document())
    for words in (
        "not met",
        "Passkey retrieval by depth",
        "keeps 1024 tokens, int8",
        "snapkv",
        "onnxruntime 1.31.1",
    ):
        assert words in page
    assert page.count('class="cell ') == sample.LAYERS * 3
    assert page.count(" ring") >= 1


def test_the_page_escapes_what_it_did_not_write() -> None:
    document = _document()
    document["artifact"] = "<b>out</b>"
    page = render_html(document)
    assert "<b>out</b>" not in page
    assert "a &lt;mask&gt; computed at run time" in page


def test_verdicts_know_which_way_is_better_and_claim_nothing_within_a_percent() -> None:
    measures = {measure.name: measure for measure in MEASURES}
    assert measures["state_bytes"].verdict(0.5) == "better"
    assert measures["perplexity"].verdict(1.2) == "worse"
    assert measures["prefill_seconds"].verdict(1.005) == "same"
    assert measures["passkey_accuracy"].verdict(1.5) == "better"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2.51, -0.07), (1000, 8000), (3, 3), (0, 0), (0.98, 2.9)])
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    values = ticks(low, high)
    assert values[0] <= low
    assert values[-1] >= high
    assert 2 <= len(values) <= 8


def test_losses_are_averaged_over_windows_and_bins() -> None:
    assert smoothed([[1.0, 1.0, 3.0, 3.0, 9.0], [2.0, 2.0, 4.0, 4.0, 9.0]], 2) == ((1.0, 1.5), (3.0, 3.5))
