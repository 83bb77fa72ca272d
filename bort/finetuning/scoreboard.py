"""GLUE's and SuperGLUE's averages over the metrics.json files of several runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from bort.files import read_json
from data.task import Task
from data.tasks import LEADERBOARDS, get_task, task_names


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


def task_score(task: Task, best: dict[str, dict[str, float]]) -> float:
    """Return the leaderboard's figure, 0 to 100, from {split: {metric: value}} of the best epoch.

    Metrics are averaged within a split, then the splits (MNLI has two).
    """
    return 100 * float(np.mean([task.score(values) for values in best.values()]))


def read_scores(folders: Sequence[Path]) -> dict[str, list[float]]:
    """Return {task name: scores} from every metrics.json under the folders.

    Raises `UserError` where there is none, or one that no fine-tuning run has written.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for _, content in read_runs(folders):
        for name, score in _scores_of(content).items():
            scores[name].append(score)
    return scores


def read_runs(folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the path and the content of every metrics.json under the folders.

    Raises `UserError` where there is none, or one that no fine-tuning run has written.
    """
    runs = []
    for path in sorted({path for folder in folders for path in folder.rglob("metrics.json")}):
        content = read_json(str(path))
        try:
            get_task(content["task"])
            _scores_of(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not a fine-tuning run's metrics.json ({error})") from None
        runs.append((path, content))
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no metrics.json there")
    return runs


def _scores_of(content: dict[str, Any]) -> dict[str, float]:
    """Return the score of a run on its dev sets, and on labelled sets of tasks it predicts, too."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, answers in content["answers"].items():
        other, _, split = name.rpartition("/")
        counts = bool(other) or split in get_task(content["task"]).dev
        if counts and "metrics" in answers:
            found[other or content["task"]][split] = answers["metrics"]
    return {name: task_score(get_task(name), splits) for name, splits in found.items()}


def suite_score(suite: str, scores: dict[str, list[float]]) -> SuiteScore:
    """Return a suite's table; every task counts once, however many runs it has."""
    names = task_names(suite)
    tasks = [TaskScore(name, scores[name]) for name in names if name in scores]
    counted = [name for name in names if suite in LEADERBOARDS and not get_task(name).model_task]
    missing = [name for name in counted if name not in scores]
    means = [task.mean for task in tasks if task.name in counted]
    average = float(np.mean(means)) if means and not missing else None
    return SuiteScore(tasks, missing, average)


def as_table(suite: str, score: SuiteScore) -> str:
    """Return the table in words, one line per task and one for the average."""
    lines = [f"{suite:<14}{'runs':>5}{'mean':>8}{'spread':>8}{'best':>8}"]
    for task in score.tasks:
        spread = "-" if task.spread is None else f"{task.spread:.2f}"
        lines.append(
            f"{task.name:<14}{len(task.runs):>5}{task.mean:>8.2f}{spread:>8}{max(task.runs):>8.2f}"
        )
    if score.missing:
        lines.append(f"average: not given, no run of {', '.join(score.missing)}")
    elif score.average is not None:
        lines.append(f"{'average':<14}{'':>5}{score.average:>8.2f}")
    return "\n".join(lines)
