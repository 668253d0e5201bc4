"""Charts as inline SVG: no scripts, no network, colours from the style sheet, so they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

_LABEL, _BAR_WIDTH, _VALUE, _ROW = 92, 190, 84, 24
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 240, 52, 14, 12, 40


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: `style` is a class of the style sheet."""

    label: str
    value: float
    text: str
    style: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; points with `hollow` set are drawn as rings."""

    label: str
    style: str
    points: tuple[tuple[float, float], ...]
    hollow: tuple[bool, ...] = ()
    marked: bool = True


def bar_chart(bars: Sequence[Bar]) -> Markup:
    """Return horizontal bars from zero on one scale, each with its value written at the end."""
    longest = max((bar.value for bar in bars), default=0.0) or 1.0
    parts = []
    for index, bar in enumerate(bars):
        y = index * _ROW + 4
        length = max(1.0, bar.value / longest * _BAR_WIDTH)
        middle = y + _ROW / 2
        label, text = escape(bar.label), escape(bar.text)
        parts.append(
            f'<text class="axis" x="{_LABEL - 8}" y="{middle}" text-anchor="end">{label}</text>'
            f'<rect class="{bar.style}" x="{_LABEL}" y="{y + 4}" rx="2" '
            f'width="{length:.1f}" height="{_ROW - 8}">'
            f"<title>{label}: {text}</title></rect>"
            f'<text class="value" x="{_LABEL + length + 6:.1f}" y="{middle}">{text}</text>'
        )
    return _svg(_LABEL + _BAR_WIDTH + _VALUE, len(bars) * _ROW + 8, "".join(parts))


def line_chart(
    lines: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str] = lambda value: f"{value:g}",
    baseline: float | None = None,
) -> Markup:
    """Return lines over a common grid; `baseline` draws one more dashed level across."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([baseline] if baseline is not None else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs))
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at_x(value: float) -> float:
        return _LEFT + (value - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / ((y_high - y_low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(_grid_line(at_y(tick)))
        parts.append(
            f'<text class="axis" x="{_LEFT - 6}" y="{at_y(tick):.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        place = f'x="{at_x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 14}"'
        parts.append(f'<text class="axis" {place} text-anchor="middle">{escape(x_text(tick))}</text>')
    if baseline is not None:
        parts.append(_grid_line(at_y(baseline), style="baseline"))
    for line in lines:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if line.marked:
            for index, (x, y) in enumerate(line.points):
                ring = " ring" if line.hollow and line.hollow[index] else ""
                told = f"{line.label}: {x_text(x)}, {y:.4g}"
                parts.append(
                    f'<circle class="dot {line.style}{ring}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4">'
                    f"<title>{escape(told)}</title></circle>"
                )
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{centre}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )
    return _svg(_WIDTH, _HEIGHT, "".join(parts))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values that span low to high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def smoothed(losses: Sequence[Sequence[float]], bin_tokens: int) -> tuple[tuple[float, float], ...]:
    """Average windows of losses position by position, then over bins of positions: (middle of bin, mean)."""
    length = min(map(len, losses))
    points = []
    for first in range(0, length - bin_tokens + 1, bin_tokens):
        values = [value for window in losses for value in window[first : first + bin_tokens]]
        points.append((first + bin_tokens / 2, sum(values) / len(values)))
    return tuple(points)


def _grid_line(y: float, style: str = "grid") -> str:
    return f'<line class="{style}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


_OPEN: Final = '<svg role="img" viewBox="0 0 {width} {height}" style="max-width:{width}px">'


def _svg(width: int, height: int, content: str) -> Markup:
    return Markup(_OPEN.format(width=width, height=height) + content + "</svg>")
