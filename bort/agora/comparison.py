"""Agora compared with plain fine-tuning and the best of a grid, over several draws of a task."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from bort.files import read_json_as
from bort.tables import markdown_table, spread
from data.task import Task


@dataclass(frozen=True)
class _Predicted:
    metrics: Optional[dict[str, float]] = None


@dataclass(frozen=True)
class _PlainRun:
    """What the comparison reads of metrics.json."""

    answers: dict[str, _Predicted]
    seconds: float


@dataclass(frozen=True)
class _Tested:
    test: Optional[dict[str, float]] = None


@dataclass(frozen=True)
class _Round:
    seconds: float


@dataclass(frozen=True)
class _AgoraRun:
    """What the comparison reads of agora.json of a run that has finished."""

    rounds: list[_Round]
    timaeus: _Tested
    best_of_grid: _Tested
    best: _Tested


class Column(NamedTuple):
    """A method: its test score in each draw, and the mean seconds of a run, if known."""

    name: str
    scores: np.ndarray
    seconds: Optional[float] = None


def columns_of(
    task: Task, plain: Sequence[str], agora: Sequence[str], random: Sequence[str]
) -> list[Column]:
    """Read the test scores and times of the runs.

    Raises `UserError` for a run without metrics of a test set, for unequal numbers of runs, and
    for one that is given twice.
    """
    if not len(plain) == len(agora) == len(random or agora):
        raise UserError("--plain, --agora and --random: give as many runs of each, one per draw")
    for flag, folders in (("--plain", plain), ("--agora", agora), ("--random", random)):
        if len(set(map(os.path.realpath, folders))) < len(folders):
            raise UserError(f"{flag}: names a run twice; give one run of each draw")
    plain_runs = [_plain_run(task, folder) for folder in plain]
    agora_runs = [_agora_run(task, folder) for folder in agora]
    random_runs = [_agora_run(task, folder) for folder in random]
    fine_tuned = [run.answers.get(task.test[0], _Predicted()).metrics for run in plain_runs]
    enumerated = [run.best_of_grid.test for run in agora_runs]
    plain_seconds = float(np.mean([run.seconds for run in plain_runs]))
    grid_seconds = float(np.mean([run.rounds[0].seconds for run in agora_runs]))
    labeller = [run.timaeus.test for run in agora_runs]
    columns = [
        Column("plain", _scores(task, plain, fine_tuned), plain_seconds),
        Column("best of grid", _scores(task, agora, enumerated), grid_seconds),
    ]
    for name, folders, runs in (
        ("Agora", agora, agora_runs),
        ("random augmentation", random, random_runs),
    ):
        if not runs:
            continue
        best = [run.best.test for run in runs]
        seconds = [sum(record.seconds for record in run.rounds) for run in runs]
        columns.append(Column(name, _scores(task, folders, best), float(np.mean(seconds))))
    if all(labeller):
        columns.append(Column("Timaeus", _scores(task, agora, labeller)))
    return columns


def _plain_run(task: Task, folder: str) -> _PlainRun:
    return read_json_as(os.path.join(folder, task.name, "metrics.json"), _PlainRun)


def _agora_run(task: Task, folder: str) -> _AgoraRun:
    path = os.path.join(folder, task.name, "agora.json")
    if "best" not in read_json_as(path, dict):
        raise UserError(f"{path}: the run has not finished; rerun its command to resume it")
    run = read_json_as(path, _AgoraRun)
    if not run.rounds:
        raise UserError(f"{path}: is not the record of a run, it has no rounds")
    return run


def _scores(
    task: Task, folders: Sequence[str], metrics: Sequence[Optional[Mapping[str, float]]]
) -> np.ndarray:
    scores = []
    for folder, on_test in zip(folders, metrics):
        if not on_test:
            raise UserError(f"{folder}: has no metrics of a test set: there was none with labels")
        try:
            scores.append(task.score(on_test))
        except KeyError as error:
            raise UserError(f"{folder}: its test set has no {error} of {task.name}") from None
    return np.array(scores)


def comparison_table(name: str, columns: Sequence[Column]) -> str:
    """Return the columns of one task as a Markdown table."""
    by_name = {column.name: column for column in columns}
    gains = by_name["Agora"].scores - by_name["best of grid"].scores
    scores = [spread(column.scores) for column in columns]
    won = f"{int(np.sum(gains > 0))} of {len(gains)}"
    times = ["" if column.seconds is None else f"{column.seconds:.0f}" for column in columns]
    return markdown_table(
        ["task", *by_name, "Agora - best of grid", "draws won"],
        [[name, *scores, spread(gains), won], ["seconds of fits", *times, "", ""]],
    )
