"""Tables in Markdown, and for a terminal."""

from __future__ import annotations

import statistics
from typing import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, its last line ended; a `|` in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_escaped, cells))} |\n" for cells in lines)


def _escaped(cell: str) -> str:
    return " ".join(cell.splitlines()).replace("|", "\\|")


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells in columns of the width of their longest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
    return "".join(f"{line}\n" for line in lines)


def spread(runs: Iterable[float], digits: int = 3) -> str:
    """Return "mean ± standard deviation" of several runs, or the value of a single one."""
    values = [float(value) for value in runs]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    deviation = statistics.stdev(values)
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"
