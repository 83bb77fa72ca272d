#!/usr/bin/env python3
r"""Compare plain fine-tuning, the best of a grid and Agora on the test sets of several draws.

    python scripts/compare_agora.py SST-2 --plain plain/draw-* --agora agora/draw-* \
        --random random/draw-*

Each folder is the --output_dir of one run: of finetune_classifier.py, of run_agora.py, and of
run_agora.py with --images_from random, in the same order of draws. Prints a Markdown table: mean
and standard deviation over the draws of the task's score on its test set, which nothing is
selected on; the draws that Agora wins against the best of its grid; seconds of a run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.files import read_json
from data.task import Task
from data.tasks import get_task


class Column(NamedTuple):
    """A way to train: its test score in each draw, and the mean seconds of a run, if known."""

    name: str
    scores: np.ndarray
    seconds: Optional[float] = None


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[Column]:
    """Print the table; returns its columns."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("task", help="name of the task")
    for name, text in (
        ("plain", "runs of finetune_classifier.py"),
        ("agora", "runs of run_agora.py"),
        ("random", "the same with --images_from random; may be left out"),
    ):
        needed = name != "random"
        parser.add_argument(
            f"--{name}", nargs="+", required=needed, default=[], metavar="RUN", help=text
        )
    parsed = parser.parse_args(argv)
    if not len(parsed.plain) == len(parsed.agora) == len(parsed.random or parsed.agora):
        raise UserError("--plain, --agora and --random: give as many runs of each, one a draw")
    columns = columns_of(get_task(parsed.task), parsed.plain, parsed.agora, parsed.random)
    print(table(parsed.task, columns))
    return columns


def columns_of(
    task: Task, plain: Sequence[str], agora: Sequence[str], random: Sequence[str]
) -> list[Column]:
    """Read the test scores and times of the runs."""
    plain_runs, agora_runs, random_runs = (
        [read_json(os.path.join(one, task.name, name)) for one in folders]
        for folders, name in (
            (plain, "metrics.json"),
            (agora, "agora.json"),
            (random, "agora.json"),
        )
    )
    fine_tuned = [run["answers"][task.test[0]].get("metrics") for run in plain_runs]
    enumerated = [run["best_of_grid"]["test"] for run in agora_runs]
    grid_seconds = [run["rounds"][0]["seconds"] for run in agora_runs]
    labeller = [run["timaeus"].get("test") for run in agora_runs]
    columns = [
        Column("plain", _scores(task, plain, fine_tuned), _mean(plain_runs)),
        Column("best of grid", _scores(task, agora, enumerated), float(np.mean(grid_seconds))),
    ]
    for name, folders, runs in (
        ("Agora", agora, agora_runs),
        ("random images", random, random_runs),
    ):
        if not runs:
            continue
        found = [run["best"]["test"] for run in runs]
        seconds = [sum(one["seconds"] for one in run["rounds"]) for run in runs]
        columns.append(Column(name, _scores(task, folders, found), float(np.mean(seconds))))
    if all(labeller):
        columns.append(Column("Timaeus", _scores(task, agora, labeller)))
    return columns


def _scores(
    task: Task, folders: Sequence[str], metrics: Sequence[Optional[Mapping[str, float]]]
) -> np.ndarray:
    for folder, found in zip(folders, metrics):
        if not found:
            raise UserError(f"{folder}: has no metrics of a test set: its test file had no labels")
    return np.array([task.score(dict(found or {})) for found in metrics])


def _mean(runs: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([run["seconds"] for run in runs]))


def table(name: str, columns: Sequence[Column]) -> str:
    """Return the columns as a table of one task."""
    by_name = {column.name: column for column in columns}
    gains = by_name["Agora"].scores - by_name["best of grid"].scores
    heads = ["task", *by_name, "Agora - best of grid", "draws won"]
    cells = [_spread(column.scores) for column in columns]
    won = f"{int(np.sum(gains > 0))} of {len(gains)}"
    times = ["" if column.seconds is None else f"{column.seconds:.0f}" for column in columns]
    rows = [
        heads,
        ["---"] * len(heads),
        [name, *cells, _spread(gains), won],
        ["seconds of fits", *times, "", ""],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values: np.ndarray) -> str:
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
