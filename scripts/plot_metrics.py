#!/usr/bin/env python3
"""Plot the metrics of one or several pretraining runs.

    python scripts/plot_metrics.py RUN ... [--output metrics.png]

RUN is the folder of a run, or its metrics.jsonl. Lines are training, markers the held-out data.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import UserError, entry_point
from bort.files import WHOLE_BYTES, open_regular
from bort.plots import figure_file
from bort.reporter import metric_record
from bort.types import JSONObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "metrics.jsonl"
# Name in the file, title, unit of the vertical axis.
PANELS = (
    ("loss", "loss that is trained on", "nats"),
    ("mlm_loss", "masked-LM loss", "nats"),
    ("kl", "distance from the teacher, T² KL", "nats"),
    ("accuracy", "accuracy at masked positions", ""),
    ("lr", "learning rate", ""),
    ("tokens_per_second", "throughput", "tokens/s"),
)
COLUMNS = 3
# Above this number of points, markers would hide the line.
MOST_MARKERS = 60


@dataclass(frozen=True)
class PlotSettings:
    """The file of the plot."""

    output: Optional[str] = option(
        None, "PNG, PDF or SVG (default: metrics.png in the first run's folder)"
    )


class Curve(NamedTuple):
    """The finite values of one metric: steps and values."""

    steps: list[int]
    values: list[float]


class Run(NamedTuple):
    """One run: a name for the legend and the lines of its metrics.jsonl."""

    name: str
    records: list[JSONObject]

    def curve(self, phase: str, metric: str) -> Curve:
        """Return a metric of phase `train` or `eval` over the steps."""
        points = [
            (record["step"], record[metric])
            for record in self.records
            if record["phase"] == phase and math.isfinite(record.get(metric, math.nan))
        ]
        return Curve([step for step, _ in points], [value for _, value in points])


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> str:
    """Plot the runs; returns the path of the plot."""
    parser = parser_for(str(__doc__), PlotSettings)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its file")
    parsed = vars(parser.parse_args(argv))
    settings = build(PlotSettings, parsed)
    runs = [read_run(path) for path in parsed["runs"]]
    folder = os.path.dirname(metrics_file(parsed["runs"][0]))
    output = settings.output or os.path.join(folder, "metrics.png")
    plot(runs, output)
    print(output)
    return output


def metrics_file(path: str) -> str:
    """Return the metrics.jsonl of a run's folder, or the file itself."""
    return os.path.join(path, FILE) if os.path.isdir(path) else path


def read_run(path: str) -> Run:
    """Read the metrics of a run; raises `UserError` when there are none or they cannot be read.

    A last line without its end is left out: the run is writing it, or was killed while it did.
    """
    file = metrics_file(path)
    try:
        with open_regular(file, WHOLE_BYTES) as handle:
            lines = [line for line in handle if line.endswith(b"\n")]
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); name the folder of a run"
        ) from None
    if not lines:
        raise UserError(f"{file}: holds no metrics yet; wait for the run's first line")
    records = []
    for number, line in enumerate(lines, start=1):
        record = metric_record(line)
        if record is None:
            raise UserError(f"{file}:{number}: is damaged or not a metric line; delete it")
        records.append(record)
    return Run(os.path.normpath(path), records)


def plot(runs: Sequence[Run], path: str) -> None:
    """Plot a panel for each metric that any run has; raises `UserError` when it cannot write."""
    phases = ("train", "eval")
    panels = [
        panel
        for panel in PANELS
        if any(run.curve(phase, panel[0]).steps for run in runs for phase in phases)
    ]
    if not panels:
        raise UserError(f"{runs[0].name}: none of its values is finite; there is nothing to plot")
    rows, columns = -(-len(panels) // COLUMNS), min(COLUMNS, len(panels))
    with figure_file(path, 4.6 * columns, 3.1 * rows + 0.6) as figure:
        axes = None
        for number, (metric, title, unit) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, number, sharex=axes)
            for run_number, run in enumerate(runs):
                _plot_run(axes, run, metric, f"C{run_number % 10}")
            axes.set_title(title, fontsize=10)
            axes.set_ylabel(unit)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if metric == "tokens_per_second":
                axes.set_ylim(bottom=0)
        _add_legend(figure, runs)


def _plot_run(axes: Axes, run: Run, metric: str, colour: str) -> None:
    trained, held_out = run.curve("train", metric), run.curve("eval", metric)
    # A single point has no line.
    axes.plot(*trained, color=colour, linewidth=1.2, marker="." if len(trained.steps) == 1 else "")
    every = max(1, len(held_out.steps) // MOST_MARKERS)
    axes.plot(*held_out, color=colour, linestyle="", marker="o", markersize=4, markevery=every)


def _add_legend(figure: Figure, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D

    # Matplotlib leaves out what begins with an underscore.
    names = [f"./{run.name}" if run.name.startswith("_") else run.name for run in runs]
    handles = [Line2D([], [], color=f"C{n % 10}", label=name) for n, name in enumerate(names)]
    if any(record["phase"] == "eval" for run in runs for record in run.records):
        handles.append(Line2D([], [], color="grey", linestyle="", marker="o", label="held out"))
    place = {"loc": "outside lower center", "ncols": 3, "fontsize": 9, "frameon": False}
    for text in figure.legend(handles=handles, **place).get_texts():
        text.set_parse_math(False)  # a $ in a folder's name begins no formula


if __name__ == "__main__":
    main()
