"""A table of fine-tuning runs: rows read, scores, time, and the check of their submissions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

from bort.errors import UserError
from bort.files import read_json_as
from bort.finetuning.scoreboard import RunMetrics, metrics_files, read_run
from bort.tables import markdown_table
from data.submission import check_submission
from data.task import Task
from data.tasks import get_task

HEADER = (
    *("run", "task", "rows read", "trained on", "steps", "dev", "most frequent answer", "seconds"),
    "submission",
)


class RunReport(NamedTuple):
    """One task of a run; each field is text, "-" where the run does not record it.

    run: the folder of the results.
    rows: rows of every split, and the official number where fewer were read.
    dev, baseline: the metrics on the dev sets, named where a task has several, and those of the
        most frequent label.
    submission: the files checked against their test sets, or what is wrong with them.
    """

    run: str
    task: str
    rows: str
    train_examples: str
    steps: str
    dev: str
    baseline: str
    seconds: str
    submission: str


@dataclass(frozen=True)
class _DataDir:
    data_dir: Optional[str] = None


@dataclass(frozen=True)
class _RunConfig:
    """What the report reads of a run's config.json: the flags of its concern `TaskSettings`."""

    TaskSettings: _DataDir


def report(folders: Sequence[Path]) -> tuple[list[RunReport], list[str]]:
    """Return one report per run under the folders, and per task that a run predicted besides.

    The test sets are read again, from the folder in the run's config.json. Also returns one
    message per metrics.json that is not of a run. Raises `UserError` where there is none at all.
    """
    reports: list[RunReport] = []
    problems: list[str] = []
    for path in metrics_files(folders):
        try:
            reports += _reports(path, read_run(path))
        except UserError as error:
            problems.append(str(error))
    return reports, problems


def _reports(path: Path, run: RunMetrics) -> list[RunReport]:
    task = get_task(run.task)
    data_dir = _data_dir(path.parent / "config.json")
    tests = {name: each.rows for name, each in run.answers.items() if name in task.test}
    # An Agora run records the rows of the sets it predicted, not of its training set.
    rows = run.rows or {name: run.answers[name].rows for name in task.dev if name in run.answers}
    own = RunReport(
        run=str(path.parent),
        task=task.name,
        rows=_rows(task, {**rows, **tests}),
        train_examples="-" if run.train_examples is None else f"{run.train_examples:,}",
        steps="-" if run.steps is None else f"{run.steps:,}",
        dev=_metrics({name: run.answers[name].metrics for name in task.dev if name in run.answers}),
        baseline=_metrics(run.baseline),
        seconds="-" if run.seconds is None else f"{run.seconds:.0f}",
        submission=_submission(task, tests, data_dir, path.parent),
    )
    return [own, *_predicted(path.parent.parent, data_dir, run)]


def _data_dir(path: Path) -> Optional[str]:
    """Return the data folder in a run's config.json; None, the default one, without the file."""
    if not os.path.exists(path):
        return None
    return read_json_as(str(path), _RunConfig).TaskSettings.data_dir


def _predicted(folder: Path, data_dir: Optional[str], run: RunMetrics) -> list[RunReport]:
    """Return the reports of the diagnostic sets that a run's model has predicted."""
    reports = []
    for name, predictions in run.answers.items():
        other, _, split = name.rpartition("/")
        if other:
            task = get_task(other)
            rows = {split: predictions.rows}
            own = folder / task.name
            checked = _submission(task, rows, data_dir, own)
            shown = _metrics({split: predictions.metrics})
            cells = (str(own), task.name, _rows(task, rows), "-", "-", shown, "-", "-", checked)
            reports.append(RunReport(*cells))
    return reports


def _rows(task: Task, rows_by_split: Mapping[str, int]) -> str:
    parts = []
    for split, rows in rows_by_split.items():
        official = task.official_rows(split)
        withdrawn = task.withdrawn_version(split, rows)
        note = f" (of {official:,})" if rows < official else ""
        parts.append(f"{split} {rows:,}" + (f" ({withdrawn})" if withdrawn else note))
    return ", ".join(parts) or "-"


def _metrics(metrics_by_split: Mapping[str, Optional[Mapping[str, float]]]) -> str:
    several = len(metrics_by_split) > 1
    shown = [
        f"{split}: " * several + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        for split, metrics in metrics_by_split.items()
        if metrics
    ]
    return "; ".join(shown) or "-"


def _submission(task: Task, tests: Mapping[str, int], data_dir: Optional[str], folder: Path) -> str:
    parts = []
    for split in tests:
        name = task.submission_file(split)
        if name is None:
            continue
        path = task.find(data_dir, split)
        if path is None:
            parts.append(
                f"{name}: NOT CHECKED, no {split} set in {data_dir or 'the default folder'}"
            )
            continue
        try:
            examples = task.read(data_dir, split, skip_bad_rows=True).examples
            rows = check_submission(folder / name, task, split, examples)
            parts.append(f"{name}: {rows:,} valid")
        except UserError as error:
            parts.append(f"REFUSED: {error}")
    return ", ".join(parts) or "-"


def as_markdown(reports: Sequence[RunReport]) -> str:
    """Format the table in Markdown."""
    return markdown_table(HEADER, reports)
