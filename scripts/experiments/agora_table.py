#!/usr/bin/env python3
r"""Print the tables of agora.sh: every method on the test sets of several draws.

    python scripts/experiments/agora_table.py runs/experiments/agora/SST-2/200

Each folder has a folder per method with a run per draw: `plain` of finetune_classifier.py, the
others of run_agora.py. The best of the grid and Timaeus are those of the method `mistakes`. A table
gives the mean and standard deviation over the draws of the test score and of its difference from
the best of the grid, the draws won against it, the rows that the last fits had besides the scarce
ones, the share of augmented examples with the class of their dev example, by how much the dev score
that was selected on exceeds the test score, and the seconds of training.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

import numpy as np

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.files import read_json
from bort.tables import markdown_table, spread
from bort.types import JSONObject
from data.task import Task
from data.tasks import get_task

HEADER = ("method", "test", "- best of grid", "draws won", "added", "same label", "dev - test", "s")


class Run(NamedTuple):
    """One method on one draw: scores, rows added to train, those with dev's label, seconds."""

    dev: float
    test: float
    seconds: float
    added: Optional[int] = None
    same: Optional[float] = None


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[str]:
    """Print a table for each folder; returns them."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("folders", nargs="+", metavar="TASK/ROWS", help="folders of methods")
    tables = [table(Path(folder)) for folder in parser.parse_args(argv).folders]
    print("\n".join(tables), end="")
    return tables


def table(folder: Path) -> str:
    """Return the table of one task and number of rows.

    Raises `UserError` when a method lacks a draw that `mistakes` has, and for a run that has not
    finished.
    """
    task = get_task(folder.parent.name)
    draws = sorted(path.name for path in (folder / "mistakes").glob("draw-*"))
    if not draws:
        raise UserError(f"{folder}: has no runs mistakes/draw-*")
    names = sorted(path.name for path in folder.iterdir() if (path / draws[0]).is_dir())
    methods = {name: [run(task, folder / name / draw) for draw in draws] for name in names}
    first = [_content(task, folder / "mistakes" / draw) for draw in draws]
    grid = [_first_round(task, content) for content in first]
    rows = [_row("best of grid", grid, grid)]
    rows += [_row(name, runs, grid) for name, runs in methods.items()]
    labeller = spread([task.score(content["timaeus"]["test"]) for content in first])
    rows.append(["Timaeus", labeller, *[""] * (len(HEADER) - 2)])
    title = f"{task.name}, {folder.name} rows, {len(draws)} draws"
    return f"{title}\n\n{markdown_table(HEADER, rows)}"


def run(task: Task, folder: Path) -> Run:
    """Read a run of either program."""
    if folder.parent.name == "plain":
        content = read_json(str(folder / task.name / "metrics.json"))
        dev, test = (content["answers"][split]["metrics"] for split in (task.dev[0], task.test[0]))
        return Run(task.score(dev), task.score(test), content["seconds"])
    content, best = _content(task, folder), _content(task, folder)["best"]
    rounds = content["rounds"]
    seconds = sum(record["seconds"] for record in rounds)
    added = rounds[-1]["train_size"] - int(folder.parent.parent.name)
    # Earlier versions made augmented examples in a run of a single round, which fits none.
    compared = len(rounds) > 1 and task.num_outputs > 1  # two values are hardly ever equal
    same = _same_labels(folder / task.name / "images.tsv") if compared else None
    return Run(task.score(best["dev"]), task.score(best["test"]), seconds, added, same)


def _content(task: Task, folder: Path) -> JSONObject:
    path = folder / task.name / "agora.json"
    content: JSONObject = read_json(str(path))
    if "best" not in content:
        raise UserError(f"{path}: the run has not finished; rerun its command to resume it")
    return content


def _first_round(task: Task, content: JSONObject) -> Run:
    grid = content["best_of_grid"]
    seconds = content["rounds"][0]["seconds"]
    return Run(task.score(grid["dev"]), task.score(grid["test"]), seconds)


def _same_labels(path: Path) -> Optional[float]:
    with path.open(encoding="utf-8", newline="") as handle:
        kept = [
            row["timaeus"] == row["dev_label"]
            for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
            if row["kept"] == "yes"
        ]
    return float(np.mean(kept)) if kept else None


def _row(name: str, runs: Sequence[Run], grid: Sequence[Run]) -> list[str]:
    gains = [one.test - other.test for one, other in zip(runs, grid)]
    won = "" if runs is grid else f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    added = [one.added for one in runs if one.added is not None]
    same = [one.same for one in runs if one.same is not None]
    return [
        name,
        spread([one.test for one in runs]),
        "" if runs is grid else spread(gains),
        won,
        f"{np.mean(added):.0f}" if added else "",
        f"{np.mean(same):.3f}" if same else "",
        f"{np.mean([one.dev - one.test for one in runs]):.3f}",
        f"{np.mean([one.seconds for one in runs]):.0f}",
    ]


if __name__ == "__main__":
    main()
