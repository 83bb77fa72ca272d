"""The base class of all tasks: labels, official files, inputs, metrics and submission files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from bort.errors import UserError, quoted
from bort.sums import check_sum
from bort.types import JSONMapping, TaskKind
from data import metrics

Uid = Union[int, str, Tuple[int, ...]]


class Example(NamedTuple):
    """One example as the model sees it.

    uid: the official index: the key of submissions, not shifted by skipped rows (MultiRC: passage,
        question, answer; ReCoRD: query, candidate; RACE: level/file:question).
    inputs: the texts of each encoder input; the encoder joins those of one input with its
        separator. Classification has one input, multiple choice one per option.
    label: index of the class or of the right option, a float for regression, None if unlabelled.
    candidate, answers: ReCoRD's entity, and the right answers of its query.
    """

    uid: Uid
    inputs: Tuple[Tuple[str, ...], ...]
    label: Union[int, float, None] = None
    candidate: str = ""
    answers: Tuple[str, ...] = ()


class Split(NamedTuple):
    """The examples of one split in the order of its file, and one message per skipped row."""

    examples: list[Example]
    skipped: list[str]


class File(NamedTuple):
    """A split, the name of its official file, and the official number of rows."""

    split: str
    name: str
    rows: int


def split_files(
    suffix: str, train: int, dev: int, test: int, dev_name: str = "dev"
) -> Tuple[File, ...]:
    """Return the usual train, dev and test `File` of a task with their official numbers of rows."""
    return (
        File("train", f"train{suffix}", train),
        File("dev", f"{dev_name}{suffix}", dev),
        File("test", f"test{suffix}", test),
    )


def default_data_dir() -> Path:
    """Return the folder of GluonNLP's dataset cache: $MXNET_HOME/datasets or ~/.mxnet/datasets."""
    home = os.environ.get("MXNET_HOME") or os.path.join("~", ".mxnet")
    return expanded(home) / "datasets"


def expanded(path: Union[str, Path]) -> Path:
    """Return a path with the home folder in place of `~`.

    Raises `UserError` where there is none: for `~name` of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: the home folder of {Path(path).parts[0]} is unknown; give the whole path"
        ) from None


def best_classes(logits: np.ndarray) -> np.ndarray:
    """Return the class or option with the highest logit: [n, classes] -> [n]."""
    return np.asarray(logits).argmax(axis=-1)


REWRITE = "write the file again with finetune_classifier.py --only_inference"


class Task:
    """One task; the subclasses in glue.py, super_glue.py and race.py say what differs.

    name, aliases: as in `--task_name`; case, dots, dashes and underscores do not matter.
    kind: what the model predicts.
    labels: class names in the order of the model's outputs; empty for regression.
    suite_folders, folders: names of a suite's and a task's folder in a data folder, official
        layout first, then that of GluonNLP's cache.
    files: the official files; of two for the same split the first one found is read.
    measures: metrics of (labels, predictions), both [n]; reported under their own names.
    headline: the official metrics, whose mean is the leaderboard's score of the task; the
        first one decides early stopping.
    counts_from_zero: the leaderboard's indices are 0, 1, 2, ... (not MultiRC's and ReCoRD's).
    model_task: the task whose model predicts this one (its own if empty).
    text_columns: columns or keys of an input's texts in the official rows; empty where the texts
        are composed from several fields.
    headerless_columns: all columns of the official files without a header; empty if all have one.
    column_aliases: {spelling in some official files: column}.
    inputs_version: counts changes of the texts made from a row; a model predicts only rows
        of the version it was trained on.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.CLASSIFICATION
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
    headerless_columns: tuple[str, ...] = ()
    column_aliases: Mapping[str, str] = {}
    inputs_version: int = 1

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
    def splits(self) -> tuple[str, ...]:
        """Names of all splits."""
        return self._splits("")

    @property
    def early_stop(self) -> str:
        """Name of the metric that decides when training stops."""
        return self.headline[0]

    @property
    def num_outputs(self) -> int:
        """Number of the model's outputs per input: 1 for regression and for each option."""
        one_logit = self.kind in (TaskKind.REGRESSION, TaskKind.MULTIPLE_CHOICE)
        return 1 if one_logit else len(self.labels)

    def _splits(self, prefix: str) -> tuple[str, ...]:
        names = [file.split for file in self.files if file.split.startswith(prefix)]
        return tuple(dict.fromkeys(names))

    def check_split(self, split: str) -> None:
        """Raise `UserError` for a name that none of the task's splits has."""
        if split not in self.splits:
            raise UserError(
                f"{self.name}: has no split {quoted(split)}, only {', '.join(self.splits)}"
            )

    def official_rows(self, split: str) -> int:
        """Return how many rows the official file of a split has.

        Raises `UserError` for a split that the task does not have.
        """
        self.check_split(split)
        return next(file.rows for file in self.files if file.split == split)

    def withdrawn_version(self, split: str, rows: int) -> str:
        """Return the name of the withdrawn version that has so many rows, "" if there is none."""
        return ""

    def count_rows(self, examples: Sequence[Example]) -> int:
        """Return how many official rows the examples come from."""
        return len(examples)

    def first_rows(self, examples: Sequence[Example], rows: Optional[int]) -> Sequence[Example]:
        """Return the examples of the first `rows` rows, all of them for None."""
        return examples[:rows]

    def search_paths(self, data_dir: Union[str, Path, None], split: str) -> list[Path]:
        """Return every path where `read` looks for a split, in order.

        data_dir: a folder with suite folders or with task folders, the task's own folder,
            GluonNLP's cache, or None for the default one. A task's folder may contain the folder
            of its archive (superglue_multirc/MultiRC/train.jsonl).
        """
        root = default_data_dir() if data_dir is None else expanded(data_dir)
        tasks = [
            root / suite / folder for suite in (*self.suite_folders, "") for folder in self.folders
        ]
        folders = [*tasks, root, *(folder / self.folders[0] for folder in tasks)]
        names = [file.name for file in self.files if file.split == split]
        paths = [folder / name for folder in folders for name in names]
        return list(dict.fromkeys(paths))

    def find(self, data_dir: Union[str, Path, None], split: str) -> Optional[Path]:
        """Return the path of a split's file, be it a link to nothing; None if it is not there."""
        paths = self.search_paths(data_dir, split)
        return next((path for path in paths if os.path.lexists(path)), None)

    def read(
        self,
        data_dir: Union[str, Path, None],
        split: str,
        *,
        skip_bad_rows: Optional[bool] = None,
        seed: int = 0,
    ) -> Split:
        """Read one split. A label in a test file that is not one of the task's counts as absent.

        seed: decides the draw of ReCoRD's training candidates; no other task draws.
        Raises `UserError` for a split that the task does not have, when the file is missing, has no
        valid rows or is not the one that was downloaded (`bort.sums`), and for the first broken row
        unless `skip_bad_rows` (None: False, and the message does not name the flag of it).
        """
        self.check_split(split)
        path = self.find(data_dir, split)
        if path is None:
            raise UserError(self._not_found(data_dir, split))
        if path.is_file():
            check_sum(str(path))
        found = self._read(path, split, skip_bad_rows, seed)
        if not found.examples and found.skipped:
            raise UserError(
                f"{path}: all {len(found.skipped)} rows are broken, the first: {found.skipped[0]}"
            )
        if not found.examples:
            raise UserError(f"{path}: has no rows; fetch the file again")
        return found

    def _not_found(self, data_dir: Union[str, Path, None], split: str) -> str:
        return (
            f"{self.name}: no {split} set; fetch it with scripts/download_data.py {self.name}, or "
            f"name its folder with --data_dir; {self.searched(data_dir, [split])}"
        )

    def searched(self, data_dir: Union[str, Path, None], splits: Iterable[str]) -> str:
        """Return in words where `read` looks for splits, for messages."""
        root = default_data_dir() if data_dir is None else expanded(data_dir)
        paths = [path for split in splits for path in self.search_paths(data_dir, split)]
        names = list(dict.fromkeys(path.name for path in paths))
        folders = list(dict.fromkeys(os.path.relpath(path.parent, root) for path in paths))
        within = ", ".join(folder for folder in folders if folder != ".")
        return f"searched {quoted(str(root))} and in it {within} for {' or '.join(names)}"

    def _read(self, path: Path, split: str, skip_bad_rows: Optional[bool], seed: int) -> Split:
        raise NotImplementedError

    def cast_row(self, row: JSONMapping, number: int) -> list[Example]:
        """Return the unlabelled examples of one row of an official file, {column or key: value}.

        Labels and indices are not looked at; `number` stands for the row's index.
        Raises `BadRowError` for a row that is not one of this task.
        """
        raise NotImplementedError

    def source_texts(self, row: JSONMapping) -> list[str]:
        """Return the texts that the inputs of a row are composed of; `cast_row` has to accept it.

        Official files contain a few empty ones; for new text they are a mistake.
        """
        return [row[column] for column in self.text_columns]

    def fixed_part(self, place: int, text: str) -> str:
        """Return the part of a text that asks the question and stays when the text is augmented.

        `place` is the number of the text in its input.
        """
        return ""

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits [n, classes or options] into class indices [n]."""
        return best_classes(logits)

    def metrics(self, examples: Sequence[Example], logits: np.ndarray) -> dict[str, float]:
        """Return the official metrics over a whole labelled set.

        logits: [n, classes or options], or [n] for regression, in the order of the examples.

        Raises `ValueError` for examples without a label, and for logits of another number.
        """
        self.check_scored(examples, logits)
        labels = np.array([example.label for example in examples])
        predictions = self.predict(logits)
        return {measure.__name__: measure(labels, predictions) for measure in self.measures}

    def check_scored(self, examples: Sequence[Example], logits: np.ndarray) -> None:
        """Raise `ValueError` for examples without a label, and for logits of another number."""
        if not is_labelled(examples):
            raise ValueError(f"{self.name}: metrics need examples with labels")
        if len(logits) != len(examples):
            raise ValueError(f"{self.name}: {len(examples)} examples have {len(logits)} logits")

    def score(self, values: Mapping[str, float]) -> float:
        """Return the leaderboard's score: the mean of the headline metrics."""
        return float(np.mean([values[name] for name in self.headline]))

    def submission_file(self, split: str) -> Optional[str]:
        """Return the official file name for a test split, None without a leaderboard."""
        return None

    def submission(self, examples: Sequence[Example], logits: np.ndarray) -> list[str]:
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
    """Return True if every example has a label, so that metrics can be computed."""
    return all(example.label is not None for example in examples)
