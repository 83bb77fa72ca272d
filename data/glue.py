"""The nine tasks of GLUE and its diagnostic set AX: tab separated, without quoting.

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform" (2019).
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np

from bort.errors import UserError, quoted
from bort.types import JSONMapping, TaskKind
from data import metrics
from data.rows import (
    BadRowError,
    Line,
    collect,
    decode,
    parse_index,
    read_lines,
    read_submission_lines,
    require_field,
    submission_text,
)
from data.task import REWRITE, Example, File, Split, Task, Uid, split_files

# One order for every task of natural language inference, so that a model of one serves another.
INFERENCE = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
BINARY = ("0", "1")
HEADER = "index\tprediction"


class GlueTask(Task):
    """A tab-separated task; the header of each file says which column is which."""

    suite = "glue"
    suite_folders = ("glue", "glue_data")
    text_columns: tuple[str, ...] = ("sentence1", "sentence2")
    label_column = "label"

    def _read(self, path: Path, split: str, skip_bad_rows: Optional[bool], seed: int) -> Split:
        lines = read_lines(path)
        columns, first = self._columns(path, split, lines)
        self._check_columns(path, split, columns)

        def cast(line: Line) -> list[Example]:
            """Return the example of one line."""
            fields = decode(line.content).split("\t")
            if len(fields) != len(columns):
                raise BadRowError(f"expected {len(columns)} columns, found {len(fields)}")
            return [self._example(dict(zip(columns, fields)), line.number - first, split)]

        return Split(*collect(lines, cast, skip_bad_rows))

    def _columns(self, path: Path, split: str, lines: Iterator[Line]) -> tuple[list[str], int]:
        """Return the names of the columns and the number of the first line of data."""
        header = next(lines, None)
        if header is None:
            raise UserError(f"{path}: is empty; fetch the file again")
        return header.content.decode("utf-8", "replace").split("\t"), 2

    def _check_columns(self, path: Path, split: str, columns: Sequence[str]) -> None:
        wanted = list(self.text_columns)
        wanted += [] if split in self.test else [self.label_column]
        twice = [name for name in wanted if columns.count(name) > 1]
        if twice:
            raise UserError(f"{path}:1: the header has the column {twice[0]} twice; rename one")
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise UserError(
                f"{path}:1: the header has no column {', '.join(missing)}; expected the "
                f"official {split} file of {self.name}: tab separated, in UTF-8, without quotes; "
                f"found {quoted(list(columns))}"
            )

    def _example(self, row: dict[str, str], number: int, split: str) -> Example:
        texts = tuple(row[column].strip() for column in self.text_columns)
        return Example(_index(row, number), (texts,), self._label(row, split))

    def _label(self, row: dict[str, str], split: str) -> Optional[float]:
        if self.label_column not in row:
            return None
        try:
            return self._parse_label(row[self.label_column])
        except BadRowError:
            if split in self.test:  # a placeholder, such as Hugging Face's -1
                return None
            raise

    def cast_row(self, row: JSONMapping, number: int) -> list[Example]:
        """Return the example of one row."""
        texts = tuple(require_field(row, column, str).strip() for column in self.text_columns)
        return [Example(number, (texts,))]

    def _parse_label(self, text: str) -> float:
        if text not in self.labels:
            raise BadRowError(f"label {quoted(text)} is not one of {', '.join(self.labels)}")
        return self.labels.index(text)

    def submission_file(self, split: str) -> Optional[str]:
        """Return the official file name, such as CoLA.tsv."""
        return f"{self.name}.tsv"

    def submission(self, examples: Sequence[Example], logits: np.ndarray) -> list[str]:
        """Return the header and one line "index<TAB>prediction" per example."""
        predictions = self.predict(logits)
        rows = [f"{e.uid}\t{self._label_text(p)}" for e, p in zip(examples, predictions)]
        return [HEADER, *rows]

    def _label_text(self, prediction: Any) -> str:
        return self.labels[int(prediction)]

    def parse_submission(
        self, path: Path, examples: Optional[Sequence[Example]] = None
    ) -> list[Uid]:
        """Check header, columns and labels, and return the indices."""
        return collect(read_submission_lines(path), self._parse_prediction, None, REWRITE)[0]

    def _parse_prediction(self, line: Line) -> list[Uid]:
        text = submission_text(line)
        if line.number == 1:
            if text != HEADER:
                raise BadRowError("expected the header 'index<TAB>prediction'")
            return []
        fields = text.split("\t")
        if len(fields) != 2:
            raise BadRowError(f"expected 2 columns, found {len(fields)}")
        self._parse_label(fields[1])
        return [parse_index(fields[0])]


def _index(row: dict[str, str], number: int) -> int:
    """Return the official index of a row: its own column where the file has one."""
    for column in ("index", "id"):
        if column in row:
            return parse_index(row[column])
    return number


class CoLA(GlueTask):
    """Is the sentence acceptable English? Its train and dev files have no header."""

    name = "CoLA"
    labels = BINARY
    folders = ("CoLA", "glue_cola")
    files = split_files(".tsv", 8551, 1043, 1063)
    text_columns = ("sentence",)
    headerless_columns = ("source", "label", "annotation", "sentence")
    measures = (metrics.matthews, metrics.accuracy)
    headline = ("matthews",)

    def _columns(self, path: Path, split: str, lines: Iterator[Line]) -> tuple[list[str], int]:
        if split in self.test:
            return super()._columns(path, split, lines)
        return list(self.headerless_columns), 1


class SST2(GlueTask):
    """Is the film review positive? One sentence."""

    name = "SST-2"
    aliases = ("SST",)
    labels = BINARY
    folders = ("SST-2", "glue_sst")
    files = split_files(".tsv", 67349, 872, 1821)
    text_columns = ("sentence",)


class Paraphrase(GlueTask):
    """Two sentences or questions, the same meaning or not: F1 and accuracy."""

    labels = BINARY
    measures = (metrics.accuracy, metrics.f1)
    headline = ("accuracy", "f1")


class MRPC(Paraphrase):
    """Paraphrases from the news; the official files begin with a byte order mark."""

    name = "MRPC"
    folders = ("MRPC", "glue_mrpc")
    files = split_files(".tsv", 3668, 408, 1725)
    text_columns = ("#1 String", "#2 String")
    label_column = "Quality"


class QQP(Paraphrase):
    """Duplicate questions on Quora."""

    name = "QQP"
    folders = ("QQP", "glue_qqp")
    files = split_files(".tsv", 363846, 40430, 390965)
    text_columns = ("question1", "question2")
    label_column = "is_duplicate"


class STSB(GlueTask):
    """Similarity of two sentences, from 0 to 5."""

    name = "STS-B"
    kind = TaskKind.REGRESSION
    labels = ()
    folders = ("STS-B", "glue_stsb")
    files = split_files(".tsv", 5749, 1500, 1379)
    label_column = "score"
    measures = (metrics.pearson, metrics.spearman)
    headline = ("pearson", "spearman")

    def _parse_label(self, text: str) -> float:
        # float() takes digits of every script, underscores and "nan", too.
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", text):
            raise BadRowError(f"score {quoted(text)} is not a number from 0 to 5")
        score = float(text)
        if not 0 <= score <= 5:
            raise BadRowError(f"score {text} is not between 0 and 5")
        return score

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """Clip the model's outputs [n] or [n, 1] to the range of the labels: [n], 0 to 5."""
        return np.clip(np.asarray(logits, dtype=np.float64).reshape(-1), 0.0, 5.0)

    def _label_text(self, prediction: Any) -> str:
        return f"{prediction:.3f}"


class MNLI(GlueTask):
    """Inference over several genres: the dev and test sets have two parts each."""

    name = "MNLI"
    labels = INFERENCE
    folders = ("MNLI", "glue_mnli")
    files = (
        File("train", "train.tsv", 392702),
        File("dev_matched", "dev_matched.tsv", 9815),
        File("dev_mismatched", "dev_mismatched.tsv", 9832),
        File("test_matched", "test_matched.tsv", 9796),
        File("test_mismatched", "test_mismatched.tsv", 9847),
    )
    label_column = "gold_label"

    def submission_file(self, split: str) -> Optional[str]:
        """Return MNLI-m.tsv or MNLI-mm.tsv."""
        return "MNLI-mm.tsv" if split == "test_mismatched" else "MNLI-m.tsv"


class QNLI(GlueTask):
    """Does the sentence answer the question? The numbers of rows are those of version 2."""

    name = "QNLI"
    labels = ENTAILMENT
    folders = ("QNLI", "glue_qnli")
    files = split_files(".tsv", 104743, 5463, 5463)
    text_columns = ("question", "sentence")

    def withdrawn_version(self, split: str, rows: int) -> str:
        """Return "QNLI v1" for the test set that GLUE replaced in 2019."""
        return "QNLI v1" if (split, rows) == ("test", 5740) else ""


class RTE(GlueTask):
    """Textual entailment, GLUE's files of it."""

    name = "RTE"
    labels = ENTAILMENT
    folders = ("RTE", "glue_rte")
    files = split_files(".tsv", 2490, 277, 3000)


class WNLI(GlueTask):
    """Winograd schemas as inference: 1 if the second sentence follows."""

    name = "WNLI"
    labels = BINARY
    folders = ("WNLI", "glue_wnli")
    files = split_files(".tsv", 635, 71, 146)


class AX(GlueTask):
    """GLUE's diagnostic set, predicted with an MNLI model.

    The labelled file (diagnostic-full.tsv) is preferred where both are there; its rows have the
    same order.
    """

    name = "AX"
    aliases = ("diagnostic",)
    labels = INFERENCE
    folders = ("AX", "diagnostic")
    files = (
        File("test", "diagnostic-full.tsv", 1104),
        File("test", "diagnostic.tsv", 1104),
        File("test", "AX.tsv", 1104),
    )
    measures = (metrics.matthews,)
    headline = ("matthews",)
    model_task = "MNLI"
    column_aliases: Mapping[str, str] = MappingProxyType(
        {"Premise": "sentence1", "Hypothesis": "sentence2", "Label": "label"}
    )

    def _columns(self, path: Path, split: str, lines: Iterator[Line]) -> tuple[list[str], int]:
        columns, first = super()._columns(path, split, lines)
        return [self.column_aliases.get(column, column) for column in columns], first


GLUE_TASKS = (CoLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI, AX)
