#!/usr/bin/env python3
"""Print the table of scripts/experiments/finetuning.sh: dev scores by task and pretrained model.

    python scripts/experiments/finetuning_table.py RUNS

RUNS contains <model>/<task>-sweep/<run>/<task>/metrics.json; a folder <model>-random has the runs
of the same shape from random weights. Only runs with the same rate share a row. Runs with seed 0
are left out: they chose the rates. The published scores are those of the test sets in the README of
google-research/bert, whose BERT-Tiny has the weights that those here were trained from.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.finetuning.scoreboard import RunMetrics, read_run
from bort.tables import markdown_table, spread
from data.tasks import get_task

RANDOM = "-random"
Key = tuple[str, str, str]  # task, network, and rate, or all that varies but the seed
HEADER = ("task", "network", "rate", "metric", "pretrained", "random weights")
HEADER += ("most frequent answer", "published", "runs", "minutes a run")
# On the test set, in points; by (network, task, metric).
PUBLISHED = {
    ("bert-tiny", "CoLA", "matthews"): 0.0,
    ("bert-tiny", "SST-2", "accuracy"): 83.2,
    ("bert-tiny", "MRPC", "f1"): 81.1,
    ("bert-tiny", "MRPC", "accuracy"): 71.1,
    ("bert-tiny", "STS-B", "pearson"): 74.3,
    ("bert-tiny", "STS-B", "spearman"): 73.6,
    ("bert-tiny", "RTE", "accuracy"): 57.2,
}


class Cell(NamedTuple):
    """The runs of a network on a task, pretrained and from random weights."""

    pretrained: list[RunMetrics]
    random: list[RunMetrics]


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> str:
    """Print the table, and return it."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("runs", type=Path, help="folder with a folder per network")
    table = markdown_table(HEADER, _rows(_cells(parser.parse_args(argv).runs)))
    print(table, end="")
    return table


def _cells(folder: Path) -> dict[Key, Cell]:
    """Return the finished runs by key. Raises `UserError` where there is none."""
    cells: dict[Key, Cell] = {}
    for path in sorted(folder.glob("*/*-sweep/*/*/metrics.json")):
        network, run = path.parts[-5], path.parts[-3]
        if re.search(r"\bseed=0\b", run):
            continue
        varied = ",".join(part for part in run.split(",") if not part.startswith("seed="))
        key = (path.parts[-2], network.removesuffix(RANDOM), varied.removeprefix("lr="))
        cell = cells.setdefault(key, Cell([], []))
        (cell.random if network.endswith(RANDOM) else cell.pretrained).append(read_run(path))
    if not cells:
        raise UserError(f"{folder}: has no finished runs")
    return cells


def _rows(cells: dict[Key, Cell]) -> Iterator[list[str]]:
    for (task, network, varied), cell in sorted(cells.items()):
        runs = cell.pretrained + cell.random
        split = get_task(task).dev[0]
        for metric, guess in runs[0].baseline[split].items():
            published = PUBLISHED.get((network, task, metric))
            yield [
                *(task, network, varied, metric),
                *(_scores(part, split, metric) for part in cell),
                f"{100 * guess:.1f}",
                "-" if published is None else f"{published:.1f}",
                " / ".join(str(len(part)) for part in cell),
                spread([(run.seconds or 0) / 60 for run in runs], 1),
            ]


def _scores(runs: Sequence[RunMetrics], split: str, metric: str) -> str:
    """Return mean and deviation of a metric of the best epochs, in points."""
    scores = [(run.answers[split].metrics or {})[metric] for run in runs]
    return spread([100 * score for score in scores], 1) if scores else "-"


if __name__ == "__main__":
    main()
