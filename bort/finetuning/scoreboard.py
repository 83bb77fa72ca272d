"""GLUE's and SuperGLUE's averages over the metrics.json files of several runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from bort.files import files_named, read_json_as
from data.task import Task
from data.tasks import LEADERBOARDS, get_task, task_names


@dataclass(frozen=True)
class SetMetrics:
    """The predictions on one set, as metrics.json has them; `metrics` where it is labelled."""

    rows: int
    metrics: Optional[dict[str, float]] = None


@dataclass(frozen=True)
class RunMetrics:
    """The content of a metrics.json; runs of Agora have only task and answers.

    rows: rows read by split; seconds: of training.
    answers: the predictions by split, of other tasks than `task` by task/split.
    baseline: by dev split, the metrics of the most frequent label.
    """

    task: str
    answers: dict[str, SetMetrics]
    rows: dict[str, int] = field(default_factory=dict)
    train_examples: Optional[int] = None
    steps: Optional[int] = None
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: Optional[float] = None


class TaskScore(NamedTuple):
    """A task's scores, 0 to 100, one per run."""

    name: str
    runs: list[float]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return float(np.mean(self.runs))

    @property
    def spread(self) -> Optional[float]:
        """Sample standard deviation over the runs, None for a single one."""
        return float(np.std(self.runs, ddof=1)) if len(self.runs) > 1 else None


class SuiteScore(NamedTuple):
    """A suite's tasks with runs, the names of those without, and the average of the means.

    average: None unless every task that counts has a run; the diagnostic sets never count, and
        RACE has no average.
    """

    tasks: list[TaskScore]
    missing: list[str]
    average: Optional[float]


def task_score(task: Task, best: Mapping[str, Mapping[str, float]]) -> float:
    """Return the leaderboard's score, 0 to 100, from {split: {metric: value}} of the best epoch.

    Metrics are averaged within a split, then the splits (MNLI has two).
    """
    return 100 * float(np.mean([task.score(values) for values in best.values()]))


def read_scores(folders: Sequence[Path]) -> dict[str, list[float]]:
    """Return {task name: scores} from every metrics.json under the folders.

    Raises `UserError` where there is none, or one that is not of a fine-tuning or Agora run.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for path in metrics_files(folders):
        for name, score in scores_of(read_run(path)).items():
            scores[name].append(score)
    return scores


def metrics_files(folders: Sequence[Path]) -> list[Path]:
    """Return every metrics.json under the folders, each once; `UserError` where there is none."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder; name one that has runs in it")
    paths: dict[Path, Path] = {}  # as given, by the file that they name
    named = [path for folder in folders for path in files_named("metrics.json", folder)]
    for path in sorted(map(Path, named)):
        paths.setdefault(path.resolve(), path)
    if not paths:
        raise UserError(
            f"{', '.join(map(str, folders))}: no metrics.json found; name a folder of finished "
            "fine-tuning or Agora runs"
        )
    return [*paths.values()]


def read_run(path: Path) -> RunMetrics:
    """Read a metrics.json; raises `UserError` when a fine-tuning or Agora run has not written it.

    Numbers that are NaN or infinite are refused.
    """
    run = read_json_as(str(path), RunMetrics)
    try:
        scores_of(run)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: has no metric {error} of {run.task}") from None
    return run


def scores_of(run: RunMetrics) -> dict[str, float]:
    """Return the scores of a run on its dev sets, and on labelled sets of tasks it predicts."""
    scored: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    task = get_task(run.task)
    for name, predictions in run.answers.items():
        other, _, split = name.rpartition("/")
        if predictions.metrics is not None and (other or split in task.dev):
            scored[other or task.name][split] = predictions.metrics
    return {name: task_score(get_task(name), splits) for name, splits in scored.items()}


def suite_score(suite: str, scores: Mapping[str, list[float]]) -> SuiteScore:
    """Return a suite's table; every task counts once, however many runs it has."""
    names = task_names(suite)
    tasks = [TaskScore(name, scores[name]) for name in names if name in scores]
    counted = [name for name in names if suite in LEADERBOARDS and not get_task(name).model_task]
    missing = [name for name in counted if name not in scores]
    means = [task.mean for task in tasks if task.name in counted]
    average = float(np.mean(means)) if means and not missing else None
    return SuiteScore(tasks, missing, average)


def suite_scores(suites: Sequence[str], folders: Sequence[Path]) -> dict[str, SuiteScore]:
    """Return the tables of the suites that have a run under the folders.

    Raises `UserError` where there is no metrics.json, or one of something else.
    """
    scores = read_scores(folders)
    tables = {suite: suite_score(suite, scores) for suite in suites}
    return {suite: table for suite, table in tables.items() if table.tasks}


def as_table(suite: str, score: SuiteScore) -> str:
    """Format the table, one line per task and one for the average."""
    lines = [f"{suite:<14}{'runs':>5}{'mean':>8}{'spread':>8}{'best':>8}"]
    for task in score.tasks:
        spread = "-" if task.spread is None else f"{task.spread:.2f}"
        lines.append(
            f"{task.name:<14}{len(task.runs):>5}{task.mean:>8.2f}{spread:>8}{max(task.runs):>8.2f}"
        )
    if score.missing:
        lines.append(f"average: none, no run of {', '.join(score.missing)}")
    elif score.average is not None:
        lines.append(f"{'average':<14}{'':>5}{score.average:>8.2f}")
    return "\n".join(lines)
