"""Agora on the tasks: examples of text, Socrates and Timaeus made of classifiers, fits in parallel.

An example's input for `bort.agora` is `data.task.Example.inputs`, its label a class number, or a
real number for STS-B. ReCoRD goes through its rows, one for each candidate: a prediction there is
the margin of the positive class, so that the best candidate of a query can be told, and its sign
is the class. A multiple choice (COPA, RACE) is one example with an input for each option.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
)

import numpy as np

from bort.agora import algorithm as agora
from bort.agora.algorithm import Examples, Objective, input_key
from bort.agora.store import DiskStore
from bort.agora.tau import Inputs
from bort.communicator import Communicator
from bort.errors import UserError
from bort.types import Hyperparameters, TaskKind
from data.task import Example, Task, is_labelled


class TextData(NamedTuple):
    """The rows of a task.

    `test` is empty unless it has labels; `kept_out` are the inputs of the test file, with labels
    or without, that must not come into train; `dropped` counts the rows of train that were left
    out because dev or test holds them.
    """

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    kept_out: list[Inputs]
    dropped: int


def read_data(
    task: Task,
    data_dir: Optional[str],
    skip_bad_rows: bool = False,
    train_rows: Optional[int] = None,
) -> TextData:
    """Read train, dev and, if it is there, test; rows of train that dev or test holds go.

    `train_rows` takes the first so many of the rest.

    Raises `UserError` for a task without training data, and when test holds rows of dev.
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
    test = rows(name) if name and task.find(data_dir, name) else []
    kept_out = [example.inputs for example in test]
    shared = set(kept_out).intersection(example.inputs for example in dev)
    if shared and is_labelled(test):
        raise UserError(
            f"{task.find(data_dir, str(name))}: {len(shared)} of its inputs are in dev, too: a "
            "test set with labels must share none"
        )
    known = set(kept_out).union(example.inputs for example in dev)
    fresh = [example for example in train if example.inputs not in known]
    labelled = test if is_labelled(test) else []
    return TextData(task, fresh[:train_rows], dev, labelled, kept_out, len(train) - len(fresh))


def examples_of(rows: Sequence[Example]) -> Examples:
    """Return rows as Agora takes them."""
    return Examples([row.inputs for row in rows], np.array([row.label for row in rows]))


def rows_of(examples: Examples) -> list[Example]:
    """Return Agora's examples as rows to train on, numbered from 0."""
    pairs = zip(examples.inputs, examples.labels.tolist())
    return [
        Example(uid=number, inputs=one, label=label) for number, (one, label) in enumerate(pairs)
    ]


def predictions_of(task: Task, scores: np.ndarray) -> np.ndarray:
    """Return predictions [n] from scores: classes, values, or margins of ReCoRD's candidates.

    Where the fit diverged they are no numbers.
    """
    if not np.isfinite(scores).all():
        return np.full(len(scores), np.nan)
    if task.kind == TaskKind.CANDIDATES:
        return scores[:, 1] - scores[:, 0]
    return task.predict(scores)


def scores_of(task: Task, predictions: np.ndarray) -> np.ndarray:
    """Return scores that `predictions_of` turns into these predictions."""
    if task.kind == TaskKind.REGRESSION:
        return predictions
    if task.kind == TaskKind.CANDIDATES:
        return np.stack([np.zeros(len(predictions)), predictions], axis=1)
    return np.eye(max(len(task.labels), int(predictions.max()) + 1))[predictions]


def objective_of(task: Task, dev: Sequence[Example], edges: Sequence[float]) -> Objective:
    """Return what is scored: the leaderboard's figure for the task, on these rows of dev.

    `edges` cut the values of a regression into the classes by which a prediction is a mistake.
    """

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        if not np.isfinite(predictions).all():
            return float("nan")
        return task.score(task.metrics(dev, scores_of(task, predictions)))

    if task.kind == TaskKind.REGRESSION:
        return agora.regression(edges, score)
    if task.kind == TaskKind.CANDIDATES:
        return Objective(score, lambda values: (np.asarray(values) > 0).astype(int))
    return Objective(score, np.asarray)


# ---- Socrates ------------------------------------------------------------------------------------


class Tuner(Protocol):
    """Fine-tuning, as Socrates needs it; it is pickled to the workers."""

    def fit(
        self, rows: Sequence[Example], theta: Hyperparameters, start: Optional[str], folder: str
    ) -> np.ndarray:
        """Train from the pretrained body, or from the model in the folder `start`.

        Leaves the model in `folder`, which exists, and returns its scores of dev.
        """

    def score(self, folder: str, rows: Sequence[Example]) -> np.ndarray:
        """Return the scores of rows by the model in a folder."""


@dataclass
class FittedText:
    """A model in a folder, and what it says of dev."""

    folder: str
    dev_scores: Optional[np.ndarray] = None


@dataclass(frozen=True)
class TextSocrates:
    """The candidate: fine-tuning that leaves each model in a folder of its own under `folder`."""

    tuner: Tuner
    task: Task
    dev: Sequence[Inputs]
    folder: str

    def fit(
        self, dataset: Examples, theta: Hyperparameters, start: Optional[FittedText] = None
    ) -> FittedText:
        """Fine-tune with `theta`, from the pretrained body or from a model."""
        folder = tempfile.mkdtemp(dir=self.folder)
        begin = start.folder if start else None
        return FittedText(folder, self.tuner.fit(rows_of(dataset), theta, begin, folder))

    def predict(self, model: FittedText, inputs: Sequence[Inputs]) -> np.ndarray:
        """Return the predictions of inputs; those of dev are known from the fit."""
        if model.dev_scores is not None and list(inputs) == list(self.dev):
            return predictions_of(self.task, model.dev_scores)
        rows = [Example(number, one) for number, one in enumerate(inputs)]
        return predictions_of(self.task, self.tuner.score(model.folder, rows))


def open_store(folder: str) -> DiskStore:
    """Open the journal and the best model of a run in its folder."""

    def write(path: str, model: FittedText) -> None:
        shutil.copytree(model.folder, path)

    return DiskStore(folder, write, FittedText)


# ---- Timaeus -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTimaeus:
    """A fine-tuned model as labeller: `score` turns rows into the task's scores."""

    task: Task
    score: Callable[[Sequence[Example]], np.ndarray]

    def label(self, inputs: Sequence[Inputs]) -> np.ndarray:
        """Return the labels of inputs: class numbers, or values of a regression."""
        rows = [Example(number, one) for number, one in enumerate(inputs)]
        predictions = predictions_of(self.task, self.score(rows))
        return (
            (predictions > 0).astype(int) if self.task.kind == TaskKind.CANDIDATES else predictions
        )


class LabelsMissingError(UserError):
    """Inputs have to be labelled elsewhere before the run can go on."""


class FileTimaeus:
    """Labels made elsewhere: a file of JSON objects, one a line, and a file of what it lacks.

    A line is {"inputs": [["text", ...], ...], "label": ...}: the texts of each encoder input as
    `to_label` spells them, and the label's name or, for a regression, its value.
    """

    def __init__(self, task: Task, path: str, to_label: str) -> None:
        """Read the labels; raises `UserError` naming the first line that is none."""
        self.task, self.path, self.to_label = task, path, to_label
        self.labels: dict[Any, Any] = {}
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    self._add(f"{path}:{number}", line)

    def _add(self, where: str, line: str) -> None:
        try:
            row = json.loads(line)
            inputs, label = row["inputs"], row["label"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{where}: must be {{"inputs": [[...]], "label": ...}}') from None
        if self.task.kind == TaskKind.REGRESSION:
            if isinstance(label, bool) or not isinstance(label, (int, float)):
                raise UserError(f"{where}: label {label!r} is not a number")
        elif label not in self.task.labels:
            names = ", ".join(self.task.labels)
            raise UserError(f"{where}: label {label!r} is none of {names}")
        else:
            label = self.task.labels.index(label)
        self.labels[input_key(inputs)] = label

    def label(self, inputs: Sequence[Inputs]) -> np.ndarray:
        """Return the labels of inputs.

        Raises `LabelsMissingError` after it has written those that are not known to `to_label`.
        """
        missing = [one for one in inputs if input_key(one) not in self.labels]
        if missing:
            write_lines(self.to_label, ({"inputs": one, "label": None} for one in missing))
            raise LabelsMissingError(
                f"{self.path}: {len(missing)} inputs have no label yet: give those in "
                f"{self.to_label} one of {', '.join(self.task.labels) or 'a value'}, append them "
                "to it, and start the same command again: it goes on from here"
            )
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.to_label)
        return np.array([self.labels[input_key(one)] for one in inputs])


def write_lines(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, the whole file or nothing."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)


# ---- fits in parallel ----------------------------------------------------------------------------


def one_after_another(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Make the fits of a round in this process (an `agora.MapFits`)."""
    for task in tasks:
        yield from _used([function(task)])


def _used(fits: Iterable[Any]) -> Iterator[Any]:
    """Yield fits, and remove the weights of each when its receiver has kept them or not."""
    for fit in fits:
        yield fit
        shutil.rmtree(fit.model.folder, ignore_errors=True)


@contextlib.contextmanager
def processes(count: int) -> Iterator[agora.MapFits]:
    """Give a map that spreads fits over processes; they share the cores.

    Raises `UserError` when a process dies.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    def spread(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        try:
            fits = as_completed([pool.submit(function, task) for task in tasks])
            yield from _used(fit.result() for fit in fits)
        except BrokenProcessPool:
            raise UserError(
                f"--workers {count}: a worker died, perhaps for lack of memory; start the same "
                "command again with fewer: it goes on from here"
            ) from None

    # A fork would share MXNet's threads, which do not survive it.
    spawning = get_context("spawn")
    with ProcessPoolExecutor(count, spawning, _share_cores, (count,)) as pool:
        try:
            yield spread
        finally:
            pool.shutdown(cancel_futures=True)


def _share_cores(processes: int) -> None:
    """Give this process its share of the threads, before it imports MXNet."""
    from bort.mxnet_setup import cpu_threads

    threads = cpu_threads()
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // processes))


@contextlib.contextmanager
def ranks(communicator: Communicator) -> Iterator[agora.MapFits]:
    """Give rank 0 a map that spreads fits over the ranks; the others serve it and never return.

    Ranks share a disk. A wave of as many fits as ranks is finished before the next begins.
    """

    def spread(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        for start in range(0, len(tasks), communicator.size):
            yield from _used(wave(communicator, (function, tasks[start:][: communicator.size])))

    try:
        yield spread
    finally:
        communicator.broadcast_object(None)
        communicator.barrier()  # a broadcast may be under way when its sender has ended


def wave(communicator: Communicator, work: Any) -> list[Any]:
    """Make a fit on each rank; `work` is rank 0's function and tasks. Returns all the fits."""
    work = communicator.broadcast_object(work)
    if work is None:
        return []
    function, tasks = work
    mine = function(tasks[communicator.rank]) if communicator.rank < len(tasks) else None
    return [fit for fit in communicator.allgather_object(mine) if fit is not None]


def serve(communicator: Communicator) -> None:
    """Make fits for rank 0 until it has no more (see `ranks`)."""
    while wave(communicator, None):
        pass
    communicator.barrier()
