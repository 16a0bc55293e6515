"""Figures as people read them: seconds, bytes, and aligned Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def seconds(value: float | None) -> str:
    """Three digits and a unit: 3.21 ms."""
    return "-" if value is None else _scaled(value, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def size(value: float | None) -> str:
    """Bytes with three digits and a unit: 86.1 MB."""
    return "unknown" if value is None else _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def rate(value: float | None) -> str:
    """Things per second, three digits and a power of a thousand: 3.21 G."""
    return "-" if value is None else _scaled(value, (("T", 1e12), ("G", 1e9), ("M", 1e6)))


def ratio(value: float | None) -> str:
    """How many times: 12.3 x."""
    return "-" if value is None else f"{three_digits(value)} x"


def three_digits(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    if value == 0:
        return "0"
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    unit, scale = next((entry for entry in units if value >= entry[1]), units[-1])
    return f"{three_digits(value / scale)} {unit}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it is and renders as Markdown; the first column is words, the others figures."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        words, *figures = cells
        aligned = [cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True)]
        return f"| {' | '.join([words.ljust(widths[0]), *aligned])} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
