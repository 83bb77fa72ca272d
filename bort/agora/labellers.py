"""Timaeus on the tasks: a fine-tuned model, or a file of labels that were made elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np

from bort.agora.algorithm import Label, input_key
from bort.agora.tau import Inputs
from bort.agora.text import predictions_of
from bort.errors import UserError, quoted
from bort.files import WHOLE_BYTES, atomic_write, open_regular
from bort.types import JSONMapping, TaskKind
from data.rows import BadRowError, parse_object, require_field
from data.task import Example, Task

FORM = '{"inputs": [["text", ...], ...], "label": ...}'


@dataclass(frozen=True)
class ModelTimaeus:
    """A fine-tuned model as labeller: `score` turns rows into the task's scores."""

    task: Task
    score: Callable[[Sequence[Example]], np.ndarray]

    def label(self, inputs: Sequence[Inputs]) -> np.ndarray:
        """Return the labels of inputs: class numbers, or the values of a regression.

        Raises `UserError` when a score is NaN or infinite.
        """
        rows = [Example(number, each) for number, each in enumerate(inputs)]
        scores = self.score(rows)
        if not np.isfinite(scores).all():
            raise UserError(
                "--timaeus: the model's outputs contain NaN or infinity; its weights are damaged "
                "or its training diverged"
            )
        predictions = predictions_of(self.task, scores)
        return (
            (predictions > 0).astype(int) if self.task.kind == TaskKind.CANDIDATES else predictions
        )


class LabelsMissingError(UserError):
    """Inputs have to be labelled elsewhere before the run can be resumed."""


class _Known(NamedTuple):
    label: Label
    line: int
    shape: tuple[int, ...]


class FileTimaeus:
    """Labels made elsewhere: a file of JSON lines, and a file of the inputs that it lacks.

    A line is {"inputs": [["text", ...], ...], "label": ...}: the texts of each encoder input as
    `to_label` spells them, and the name of the label or, in a regression, its value.
    """

    def __init__(self, task: Task, path: str, to_label: str) -> None:
        """Read the labels.

        Raises `UserError` naming the first invalid line, and when both files are one.
        """
        self.task, self.path, self.to_label = task, path, to_label
        if os.path.realpath(path) == os.path.realpath(to_label):
            raise UserError(
                f"--timaeus_labels {path}: is replaced by the run, which writes there what it "
                "lacks; move it to another name and give that"
            )
        self.known: dict[Any, _Known] = {}
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                self._add(number, line)

    def _add(self, number: int, line: bytes) -> None:
        where = f"{self.path}:{number}"
        inputs, label = _parsed(where, line)
        known = _Known(self._checked(where, label), number, _shape(inputs))
        before = self.known.setdefault(input_key(inputs), known)
        if before.label != known.label:
            raise UserError(
                f"{where}: another label than on line {before.line} for the same input; keep one"
            )

    def _checked(self, where: str, label: Label) -> Label:
        """Return a class number, or the value of a regression."""
        if self.task.kind != TaskKind.REGRESSION:
            if label not in self.task.labels:
                raise UserError(f"{where}: label {quoted(label)} is none of {self._names()}")
            return self.task.labels.index(label)
        if isinstance(label, bool) or not isinstance(label, (int, float)):
            raise UserError(f"{where}: label {quoted(label)} is not a number")
        low, high = self.task.predict(np.array([[-np.inf], [np.inf]])).tolist()  # it clips
        if not low <= label <= high:  # NaN is in no range
            raise UserError(f"{where}: label {quoted(label)} is not from {low:g} to {high:g}")
        return label

    def _names(self) -> str:
        """Return the labels as the file spells them: in quotes, numbers too."""
        return " or ".join(json.dumps(name) for name in self.task.labels)

    def label(self, inputs: Sequence[Inputs]) -> np.ndarray:
        """Return the labels of inputs.

        Raises `LabelsMissingError` after it has written the inputs without a label to `to_label`,
        and `UserError` for a line that can match no input, because it has another number of texts,
        and for labels that were given in `to_label` only.
        """
        self._require_shapes({_shape(each) for each in inputs})
        self._require_appended()
        # Each once: dev may have a row twice, and its labels could differ.
        missing = {input_key(each): each for each in inputs if input_key(each) not in self.known}
        if missing:
            lines = ({"inputs": each, "label": None} for each in missing.values())
            write_lines(self.to_label, lines)
            raise LabelsMissingError(
                f"{self.path}: {len(missing)} inputs have no label; replace null in "
                f"{self.to_label} by {self._names() or 'the value'}, append "
                "its lines to the file of labels, and rerun the same command to resume"
            )
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.to_label)
        return np.array([self.known[input_key(each)].label for each in inputs])

    def _require_appended(self) -> None:
        """Raise `UserError` rather than replace a file in which somebody has entered labels."""
        for number, line in enumerate(_lines(self.to_label), start=1):
            where = f"{self.to_label}:{number}"
            inputs, label = _parsed(where, line) if line.strip() else ([], None)
            if label is not None and input_key(inputs) not in self.known:
                raise UserError(
                    f"{where}: has a label that {self.path} lacks; append the lines to that file, "
                    "and rerun the same command to resume"
                )

    def _require_shapes(self, shapes: set[tuple[int, ...]]) -> None:
        for known in self.known.values():
            if shapes and known.shape not in shapes:
                found, expected = (" + ".join(map(str, s)) for s in (known.shape, min(shapes)))
                raise UserError(
                    f"{self.path}:{known.line}: has {found} texts, an input of {self.task.name} "
                    f"has {expected}"
                )


def _shape(inputs: Inputs) -> tuple[int, ...]:
    """Return the number of texts of each encoder input."""
    return tuple(len(texts) for texts in inputs)


def _lines(path: str) -> Iterable[bytes]:
    """Return the lines of a file, without a byte order mark; none when it does not exist."""
    if not os.path.exists(path):
        return []
    with open_regular(path, WHOLE_BYTES) as handle:
        return handle.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _parsed(where: str, line: bytes) -> tuple[Any, Label]:
    try:
        row = parse_object(line)
        inputs = require_field(row, "inputs", list)
        if not inputs or not all(isinstance(texts, list) and texts for texts in inputs):
            raise BadRowError("inputs must be a list of lists of texts")
        for text in (text for texts in inputs for text in texts):
            require_field({"text": text}, "text", str)
        if "label" not in row:
            raise BadRowError("has no 'label'")
    except BadRowError as problem:
        raise UserError(f"{where}: {problem}; a line must be {FORM}") from None
    return inputs, row["label"]


def write_lines(path: str, rows: Iterable[JSONMapping]) -> None:
    """Write rows as JSON lines, atomically."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
