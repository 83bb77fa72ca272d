"""Plots without a display, written atomically."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator

from bort.errors import UserError
from bort.files import atomic_path, remove_left_overs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


@contextmanager
def figure_file(path: str, width: float, height: float) -> Iterator[Figure]:
    """Give a Matplotlib figure of width x height inches that is saved as `path` at the end.

    The suffix of the path chooses the format (.png, .pdf, .svg). Nothing is written when the body
    raises.

    Raises `UserError` for another suffix and when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = picture_kind(path)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    remove_left_overs_of(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=kind)


def picture_kind(path: str) -> str:
    """Return the format that the suffix of a path chooses; raises `UserError` for another one."""
    from matplotlib.backend_bases import FigureCanvasBase

    kind = os.path.splitext(path)[1][1:].lower() or "png"
    # LaTeX writes .pgf, and is rarely installed.
    if kind == "pgf" or kind not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"{path}: a plot cannot be written as .{kind}; use .png, .pdf or .svg")
    return kind
