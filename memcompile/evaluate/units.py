"""Numbers as people read them, the same in gates, tables and pages."""

from __future__ import annotations


def format_bytes(value: float) -> str:
    """Return bytes with the binary unit that keeps them readable: 24.0 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def format_seconds(value: float) -> str:
    """Return a duration with the unit that keeps three digits: 6.31 s, 120 ms, 45.2 us."""
    if value >= 1 or value == 0:
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} us"


def format_percent(value: float) -> str:
    """Return a share as a percentage of three digits: 1.25%."""
    return f"{value * 100:.3g}%"


def format_ratio(value: float) -> str:
    """Return a ratio: 1.50x, 0.048x."""
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def format_number(value: float) -> str:
    """Return a number of four digits."""
    return f"{value:.4g}"
