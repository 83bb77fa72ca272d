"""The sets that fine-tuning reads: the training and dev sets, and all sets to be predicted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

from bort.errors import UserError
from bort.finetuning.config import TaskSettings
from bort.types import JSONObject
from data.task import Example, Split, Task
from data.tasks import get_task, task_names

SETS = "sets_sha256"  # the key of `sets_sha256` in what runs and sweeps record


class TaskData(NamedTuple):
    """The examples of a task: the training set and each dev set by its name."""

    task: Task
    train: Sequence[Example]
    dev: Mapping[str, Sequence[Example]]


class PredictionSet(NamedTuple):
    """A dev or test set to be predicted; `task` is the model's or one of its diagnostic sets."""

    task: Task
    split: str
    examples: Sequence[Example]
    skipped: Sequence[str]


def read_task_data(task: Task, settings: TaskSettings, seed: int) -> tuple[TaskData, JSONObject]:
    """Read the training and dev sets; also returns the rows read by split and those skipped.

    seed: decides the draw of ReCoRD's training candidates.
    Raises `UserError` when a set is missing or broken.
    """
    if task.train is None:
        raise UserError(
            f"--task_name {task.name}: has no training set; fine-tune {task.model_task} and "
            "predict with --only_inference --model_parameters"
        )
    splits = {name: _read(task, name, settings, seed) for name in (task.train, *task.dev)}
    rows = {name: task.count_rows(split.examples) for name, split in splits.items()}
    skipped = [message for split in splits.values() for message in split.skipped]
    train = task.first_rows(splits.pop(task.train).examples, settings.train_rows)
    data = TaskData(task, train, {name: split.examples for name, split in splits.items()})
    return data, {"rows": rows, "skipped": skipped}


def read_prediction_sets(
    task: Task, settings: TaskSettings, output_dir: Optional[str] = None
) -> list[PredictionSet]:
    """Read the dev and test sets that are there, and those of the tasks that this one predicts.

    Called before the first step of training: a broken file is found at once, not after it.
    Raises `UserError` when a set is broken, or is where `output_dir` would have its predictions.
    """
    dependent = [other for other in map(get_task, task_names()) if other.model_task == task.name]
    sets = []
    for each in (task, *dependent):
        for name in (*each.dev, *each.test):
            path = each.find(settings.data_dir, name)
            if path is not None:
                if output_dir is not None:
                    _refuse_to_replace(each, name, path, output_dir)
                sets.append(PredictionSet(each, name, *_read(each, name, settings)))
    return sets


def _refuse_to_replace(task: Task, split: str, path: Path, output_dir: str) -> None:
    """Raise `UserError` where predictions have a data file's name: AX, AX-b and AX-g."""
    folder = os.path.join(output_dir, task.name)
    name = task.submission_file(split)
    is_data = name in {file.name for file in task.files}
    if is_data and os.path.realpath(folder) == os.path.realpath(path.parent):
        raise UserError(
            f"--output_dir {output_dir}: the predictions of {task.name} would replace its test set "
            f"{os.path.join(folder, str(name))}; name another folder"
        )


def check_sets(settings: TaskSettings) -> dict[str, str]:
    """Raise `UserError` when a set is missing or broken that a run reads, now or at its end.

    Returns the SHA-256 of the training and dev sets.
    """
    task = get_task(settings.task_name, race_cast=settings.race_cast, flag="--task_name")
    data, _ = read_task_data(task, settings, seed=0)
    read_prediction_sets(task, settings)
    return sets_sha256(data)


def sets_sha256(data: TaskData) -> dict[str, str]:
    """Return the SHA-256 of the rows of the training set and of each dev set."""
    sets = {"train": data.train, **data.dev}
    return {name: rows_sha256(examples) for name, examples in sets.items()}


def rows_sha256(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of rows: of their numbers, inputs and labels."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(tuple(example)).encode())
    return digest.hexdigest()


def _read(task: Task, split: str, settings: TaskSettings, seed: int = 0) -> Split:
    return task.read(settings.data_dir, split, skip_bad_rows=settings.skip_bad_rows, seed=seed)
