"""What every task is: labels, official files, a cast to texts, metrics and submission rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from bort.errors import UserError
from data import metrics

Uid = Union[int, str, Tuple[int, ...]]


class Example(NamedTuple):
    """One example as the model sees it.

    uid: the official index, which submissions are keyed by and which skipped rows never shift
        (MultiRC: passage, question, answer; ReCoRD: query, candidate; RACE: level/file:question).
    inputs: the texts of each encoder input; the encoder joins those of one input with its
        separator. Classification has one input, multiple choice one per option.
    label: number of the class or right option, a float for regression, None where none is given.
    candidate, answers: ReCoRD's entity, and the right answers of its query.
    """

    uid: Uid
    inputs: Tuple[Tuple[str, ...], ...]
    label: Union[int, float, None] = None
    candidate: str = ""
    answers: Tuple[str, ...] = ()


class Split(NamedTuple):
    """The examples of one split in the order of its file; one message per row skipped."""

    examples: list[Example]
    skipped: list[str]


class File(NamedTuple):
    """A split, the official file it lies in, and how many rows that file officially has."""

    split: str
    name: str
    rows: int


def three_files(suffix: str, train: int, dev: int, test: int, dev_name: str = "dev") -> tuple:
    """Return the usual three `File`s of a task with their official numbers of rows."""
    return (
        File("train", f"train{suffix}", train),
        File("dev", f"{dev_name}{suffix}", dev),
        File("test", f"test{suffix}", test),
    )


def default_data_dir() -> Path:
    """Return the folder of GluonNLP's dataset cache: $MXNET_HOME/datasets or ~/.mxnet/datasets."""
    home = os.environ.get("MXNET_HOME") or os.path.join("~", ".mxnet")
    return Path(home).expanduser() / "datasets"


def class_numbers(scores: np.ndarray) -> np.ndarray:
    """Return the best class or option of each example: [n, classes] -> [n]."""
    return np.asarray(scores).argmax(axis=-1)


REWRITE = "let finetune_classifier.py --only_inference write the file again"


class Task:
    """One task; the subclasses in glue.py, super_glue.py and race.py say what differs.

    name, aliases: as in `--task_name`; case, dots, dashes and underscores do not matter.
    kind: "classification", "regression", "multiple_choice" (the scores of the options compete)
        or "candidates" (two classes per candidate, the best candidate answers the query).
    labels: class names in the order of the model's outputs; empty for regression.
    suite_folders, folders: where a data folder keeps the task, official layout first, then the
        one that GluonNLP's cache has.
    files: the official files; of two for the same split the first one found is read.
    measures: metrics of (labels, predictions), both [n]; reported under their own names.
    headline: the official metrics, whose mean is the leaderboard's figure for the task; the
        first one stops training early.
    counts_from_zero: the leaderboard's indices are 0, 1, 2, ... (not of MultiRC and ReCoRD).
    model_task: the task whose model predicts this one (its own name if empty).
    text_columns: columns or keys of an input's texts in the official rows, where they stand there
        as the network reads them; empty where a cast makes the texts.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str = "classification"
    labels: tuple[str, ...]
    suite: str
    suite_folders: tuple[str, ...]
    folders: tuple[str, ...]
    files: tuple[File, ...]
    measures: tuple[Callable[[np.ndarray, np.ndarray], float], ...] = (metrics.accuracy,)
    headline: tuple[str, ...] = ("accuracy",)
    counts_from_zero: bool = True
    model_task: str = ""
    text_columns: tuple[str, ...] = ()

    @property
    def train(self) -> Optional[str]:
        """Name of the training split, None for a task that is only predicted."""
        return next(iter(self._splits("train")), None)

    @property
    def dev(self) -> tuple[str, ...]:
        """Names of the development splits."""
        return self._splits("dev")

    @property
    def test(self) -> tuple[str, ...]:
        """Names of the test splits; each has its own submission file."""
        return self._splits("test")

    @property
    def early_stop(self) -> str:
        """Name of the metric that decides when training stops."""
        return self.headline[0]

    @property
    def num_outputs(self) -> int:
        """Width of the model's head: one score for regression and for each option of a choice."""
        return 1 if self.kind in ("regression", "multiple_choice") else len(self.labels)

    def _splits(self, prefix: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f.split for f in self.files if f.split.startswith(prefix)))

    def official_rows(self, split: str) -> int:
        """Return how many rows the official file of a split has."""
        return next(file.rows for file in self.files if file.split == split)

    def count_rows(self, examples: Sequence[Example]) -> int:
        """Return how many official rows the examples come from."""
        return len(examples)

    def places(self, data_dir: Union[str, Path, None], split: str) -> list[Path]:
        """Return every path where `read` looks for a split, in order.

        data_dir: a folder with suite folders or with task folders, the task's own folder,
            GluonNLP's cache, or None for the default one.
        """
        root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
        folders = [
            root / suite / folder for suite in (*self.suite_folders, "") for folder in self.folders
        ]
        names = [file.name for file in self.files if file.split == split]
        return [folder / name for folder in (*folders, root) for name in names]

    def find(self, data_dir: Union[str, Path, None], split: str) -> Optional[Path]:
        """Return the path of a split's file, None if it is not there."""
        return next((path for path in self.places(data_dir, split) if path.exists()), None)

    def read(
        self,
        data_dir: Union[str, Path, None],
        split: str,
        *,
        skip_bad_rows: bool = False,
        seed: int = 0,
    ) -> Split:
        """Read one split.

        seed: decides the draw of ReCoRD's training candidates; no other task draws.
        Raises `UserError` when the file is missing or has no rows, and for the first broken row
        unless `skip_bad_rows`.
        """
        path = self.find(data_dir, split)
        if path is None:
            wanted = self.places(data_dir, split)
            raise UserError(
                f"{self.name}: no {split} set, neither {wanted[0]} nor in {len(wanted) - 1} other "
                f"places: fetch it with scripts/download_data.py {self.name}, or say with "
                "--data_dir where it lies"
            )
        found = self._read(path, split, skip_bad_rows, seed)
        if not found.examples:
            raise UserError(f"{path}: holds no rows; fetch the file again")
        return found

    def _read(self, path: Path, split: str, skip_bad_rows: bool, seed: int) -> Split:
        raise NotImplementedError

    def cast_row(self, row: Mapping[str, Any], number: int) -> list[Example]:
        """Return the examples of one row of an official file, {column or key: value}.

        Labels need not be there. `number` stands for an index that the row does not have.
        Raises `BadRowError` for what is no row of this task.
        """
        raise NotImplementedError

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Turn scores [n, classes or options] into class numbers [n]."""
        return class_numbers(scores)

    def metrics(self, examples: Sequence[Example], scores: np.ndarray) -> dict[str, float]:
        """Return the official metrics over a whole labelled set.

        scores: [n, classes or options], or [n] for regression, in the order of the examples.
        """
        labels = np.array([example.label for example in examples])
        predictions = self.predict(scores)
        return {measure.__name__: measure(labels, predictions) for measure in self.measures}

    def score(self, values: dict[str, float]) -> float:
        """Return the leaderboard's figure: the mean of the headline metrics."""
        return float(np.mean([values[name] for name in self.headline]))

    def submission_file(self, split: str) -> Optional[str]:
        """Return the official file name for a test split, None without a leaderboard."""
        return None

    def submission(self, examples: Sequence[Example], scores: np.ndarray) -> list[str]:
        """Return the lines of the leaderboard's file, header included."""
        raise NotImplementedError

    def submission_index(self, examples: Sequence[Example]) -> list[Uid]:
        """Return the indices that the leaderboard's file must have, in order."""
        return [example.uid for example in examples]

    def parse_submission(
        self, path: Path, examples: Optional[Sequence[Example]] = None
    ) -> list[Uid]:
        """Check header, form and labels of a leaderboard's file and return its indices.

        examples: those of the test split, where the labels depend on them (ReCoRD).
        Raises `UserError` at the first line that the leaderboard would refuse.
        """
        raise NotImplementedError


def is_labelled(examples: Iterable[Example]) -> bool:
    """True if every example has a label, so that metrics can be computed."""
    return all(example.label is not None for example in examples)


REGRESSION, MULTIPLE_CHOICE, CANDIDATES = "regression", "multiple_choice", "candidates"
