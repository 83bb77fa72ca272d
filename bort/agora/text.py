"""Agora on the tasks: examples of text, classifiers as Socrates, where fits run.

The input of an example for `bort.agora` is `data.task.Example.inputs`, its label a class number, or
a real number for STS-B. An example of ReCoRD is one candidate of a query: its prediction is the
margin of the positive class, so that the best candidate of a query is known, and its sign is the
class. A multiple choice (COPA, RACE) is one example with an input for each option.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Iterator,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
)

import numpy as np

from bort.agora import algorithm as agora
from bort.agora.algorithm import Examples, Objective
from bort.agora.store import DiskStore
from bort.agora.tau import Inputs
from bort.communicator import Communicator
from bort.errors import UserError
from bort.jobs import Executor, ProcessDiedError, Processes, Ranks, Serial
from bort.types import Hyperparameters, TaskKind
from data.task import Example, Task, is_labelled


class TextData(NamedTuple):
    """The rows of a task.

    `dev` and `test` are its first sets of these (MNLI has two of each). `test` is empty unless it
    has labels. `kept_out` are the inputs of all test sets, with or without labels, and of the other
    dev sets, which must not get into train. `dropped` counts the rows of train that were dropped
    because a dev or test set has them.
    """

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    kept_out: list[Inputs]
    dropped: int


def read_text_data(
    task: Task,
    data_dir: Optional[str],
    skip_bad_rows: bool = False,
    train_rows: Optional[int] = None,
) -> TextData:
    """Read train, dev and the test sets that are there; rows of train that these have are dropped.

    `train_rows` keeps the first of the remaining rows (of ReCoRD's queries).

    Raises `UserError` for a task without training data, and when test has rows of dev.
    """
    if task.train is None:
        raise UserError(
            f"--task_name {task.name}: has no training set; run {task.model_task} and predict "
            f"{task.name} with its model"
        )

    def rows(split: str) -> list[Example]:
        return task.read(data_dir, split, skip_bad_rows=skip_bad_rows).examples

    train, dev = rows(task.train), rows(task.dev[0])
    name = next(iter(task.test), None)
    others = [each for each in (*task.test, *task.dev[1:]) if task.find(data_dir, each)]
    sets = {each: rows(each) for each in others}
    test = sets.get(str(name), [])
    kept_out = [example.inputs for examples in sets.values() for example in examples]
    shared = {example.inputs for example in test}.intersection(each.inputs for each in dev)
    if shared and is_labelled(test):
        raise UserError(
            f"{task.find(data_dir, str(name))}: {len(shared)} of its inputs are also in dev: a "
            "test set with labels must share none"
        )
    known = set(kept_out).union(example.inputs for example in dev)
    fresh = [example for example in train if example.inputs not in known]
    labelled = test if is_labelled(test) else []
    kept = list(task.first_rows(fresh, train_rows))
    return TextData(task, kept, dev, labelled, kept_out, len(train) - len(fresh))


def examples_of(rows: Sequence[Example]) -> Examples:
    """Return rows as examples of the algorithm."""
    return Examples([row.inputs for row in rows], np.array([row.label for row in rows]))


def rows_of(examples: Examples) -> list[Example]:
    """Return examples of the algorithm as rows to train on, numbered from 0."""
    pairs = zip(examples.inputs, examples.labels.tolist())
    return [
        Example(uid=number, inputs=inputs, label=label)
        for number, (inputs, label) in enumerate(pairs)
    ]


def predictions_of(task: Task, scores: np.ndarray) -> np.ndarray:
    """Return predictions [n] from scores: classes, values, or margins of ReCoRD's candidates.

    They are NaN where the fit diverged.
    """
    if not np.isfinite(scores).all():
        return np.full(len(scores), np.nan)
    if task.kind == TaskKind.CANDIDATES:
        return scores[:, 1] - scores[:, 0]
    return task.predict(scores)


def logits_for(task: Task, predictions: np.ndarray) -> np.ndarray:
    """Return logits that `predictions_of` turns into these predictions."""
    if task.kind == TaskKind.REGRESSION:
        return predictions
    if task.kind == TaskKind.CANDIDATES:
        return np.stack([np.zeros(len(predictions)), predictions], axis=1)
    return np.eye(max(len(task.labels), int(predictions.max()) + 1))[predictions]


def objective_of(task: Task, dev: Sequence[Example], edges: Sequence[float]) -> Objective:
    """Return the objective: the leaderboard's score of the task on these rows of dev.

    `edges` bin the values of a regression into classes.
    """

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        if not np.isfinite(predictions).all():
            return float("nan")
        return task.score(task.metrics(dev, logits_for(task, predictions)))

    if task.kind == TaskKind.REGRESSION:
        return agora.regression(edges, score)
    if task.kind == TaskKind.CANDIDATES:
        return Objective(score, lambda values: (np.asarray(values) > 0).astype(int))
    return Objective(score, np.asarray, lambda label: task.labels[int(label)])


# ---- Socrates ------------------------------------------------------------------------------------


class Tuner(Protocol):
    """Fine-tuning as `TextSocrates` needs it; it is pickled to the workers."""

    def fit(
        self, rows: Sequence[Example], hparams: Hyperparameters, start: Optional[str], folder: str
    ) -> np.ndarray:
        """Train from the pretrained model, or from the model in the folder `start`.

        Writes the model to `folder`, which exists, and returns its scores on dev.
        """

    def score(self, folder: str, rows: Sequence[Example]) -> np.ndarray:
        """Return the scores of rows by the model in a folder."""


@dataclass
class FittedText:
    """A model in a folder, and its scores on dev."""

    folder: str
    dev_scores: Optional[np.ndarray] = None


@dataclass(frozen=True)
class TextSocrates:
    """The candidate: fine-tuning that writes each model to a folder of its own in `folder`."""

    tuner: Tuner
    task: Task
    dev: Sequence[Inputs]
    folder: str

    def fit(
        self, dataset: Examples, hparams: Hyperparameters, start: Optional[FittedText] = None
    ) -> FittedText:
        """Fine-tune with `hparams`, from the pretrained model or from `start`."""
        folder = tempfile.mkdtemp(dir=self.folder)
        begin = start.folder if start else None
        return FittedText(folder, self.tuner.fit(rows_of(dataset), hparams, begin, folder))

    def predict(self, model: FittedText, inputs: Sequence[Inputs]) -> np.ndarray:
        """Return predictions; those on dev are known from the fit."""
        if model.dev_scores is not None and list(inputs) == list(self.dev):
            return predictions_of(self.task, model.dev_scores)
        rows = [Example(number, each) for number, each in enumerate(inputs)]
        return predictions_of(self.task, self.tuner.score(model.folder, rows))


def open_store(folder: str) -> DiskStore:
    """Open the journal and the best model of a run in its folder."""

    def write(path: str, model: FittedText) -> None:
        try:
            shutil.copytree(model.folder, path)
        except shutil.Error as error:
            _, target, reason = error.args[0][0]  # of the first file
            raise UserError(f"{target}: cannot be written ({reason})") from None

    return DiskStore(folder, write, FittedText)


# ---- where fits run ------------------------------------------------------------------------------


@contextlib.contextmanager
def fits_on(
    workers: int, communicator: Communicator, cluster: Optional[Executor] = None
) -> Iterator[agora.MapFits]:
    """Give the map that makes the fits of a round: here, in processes, on ranks, on a cluster.

    Ranks share a disk. Raises `UserError` when a process dies.
    """
    executor: Executor
    if cluster is not None:
        executor = cluster
    elif communicator.size > 1:
        executor = Ranks(communicator)
    elif workers > 1:
        executor = Processes(workers)
    else:
        executor = Serial()
    try:
        with executor:
            yield fits_by(executor)
    except ProcessDiedError as error:
        flag = "--cluster" if cluster else f"--workers {workers}"
        raise UserError(
            f"{flag}: {error}; rerun the same command with fewer workers to resume"
        ) from None


def fits_by(executor: Executor) -> agora.MapFits:
    """Return the map that makes the fits of a round on an executor.

    The weights of each fit are removed when its receiver has seen it.
    """

    def spread(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        for fit in executor.as_completed(function, tasks):
            yield fit
            shutil.rmtree(fit.model.folder, ignore_errors=True)

    return spread
