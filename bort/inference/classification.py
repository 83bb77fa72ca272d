"""Classification, regression and multiple choice: labels with probabilities for new text."""

from __future__ import annotations

import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from typing import Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np

from bort.errors import UserError, escaped
from bort.inference.base import (
    BATCH_SIZE,
    Input,
    InputSchema,
    check_texts,
    numbered_columns,
    softmax,
    texts_of,
    token_batches,
)
from bort.inference.runtime import (
    BACKENDS,
    Backend,
    backend_for,
    fastest_runtime,
    load_runtime,
    package_of,
)
from bort.parameters import check_finite, parameter_file
from bort.saved_model import (
    MASKED_LM,
    ModelConfig,
    has_our_pairs,
    load_model,
    load_model_tokenizer,
    read_model_config,
    require_tokenizer,
)
from bort.tokenization import Tokenizer
from bort.types import TaskKind
from data.encoding import encode_inputs
from data.rows import BadRowError, require_field
from data.task import Example, Task
from data.tasks import check_inputs_version, get_task

PLACEHOLDER = "@placeholder"


class Prediction(NamedTuple):
    """The prediction for one input.

    label: the class, option or candidate; None for regression.
    value: the label's probability; for regression the score.
    probabilities: of every class, option or candidate; empty for regression.
    """

    label: Optional[str]
    value: float
    probabilities: Mapping[str, float]


class Query(NamedTuple):
    """One decision: its encoder inputs, and the names of the classes, options or candidates."""

    inputs: Sequence[Sequence[str]]
    names: Sequence[str]


@dataclass(frozen=True)
class ClassificationPipeline:
    """A loaded classifier.

    task: the model's task, or another that it can predict; None for a model without a task.
    """

    model_config: ModelConfig
    tokenizer: Tokenizer
    backend: Backend
    task: Optional[Task]
    batch_size: int = BATCH_SIZE

    @property
    def num_texts(self) -> int:
        """Return the number of texts of an input; see `most_texts`."""
        return num_texts(self.model_config, self.task)

    @property
    def most_texts(self) -> Optional[int]:
        """Return the largest number of texts of an input; None: any, of candidates and options."""
        return most_texts(self.model_config, self.task, self.tokenizer)

    @property
    def schema(self) -> InputSchema:
        """Return the names of an input's texts."""
        columns = numbered_columns(self.num_texts)
        if self.task is None:
            pairs = numbered_columns(2) if self.most_texts == 2 else ()
            return InputSchema(columns, pairs)
        task = self.task
        return InputSchema(columns, task.text_columns, task.headerless_columns, task.column_aliases)

    def prepare(self, content: Input) -> list[Query]:
        """Return the decisions of an input: one, or several for some official rows.

        Raises `BadRowError` for another number of texts, an empty text, and a row that is not one
        of the task.
        """
        if isinstance(content, Mapping):
            schema = self.schema
            row = {schema.aliases.get(key, key): value for key, value in content.items()}
            columns = schema.columns
            if columns[0] not in row:
                if self.task:
                    return self._official(self.task, row)
                if schema.official and schema.official[0] in row:
                    columns = schema.official  # text1, text2
            texts = _own_texts(row, columns)
        else:
            texts = texts_of(content)
        return [self._query([text.strip() for text in texts])]

    def _official(self, task: Task, row: Mapping[str, object]) -> list[Query]:
        examples = task.cast_row(row, 0)
        if not examples:
            raise BadRowError("has no question to answer")
        check_texts(task.source_texts(row))
        if self.model_config.kind != TaskKind.CANDIDATES:
            return [Query(example.inputs, self.model_config.labels) for example in examples]
        groups = [list(group) for _, group in groupby(examples, _query_number)]
        return [
            Query([e.inputs[0] for e in group], [e.candidate for e in group]) for group in groups
        ]

    def _query(self, texts: Sequence[str]) -> Query:
        kind, labels = self.model_config.kind, self.model_config.labels
        expected, most = self.num_texts, self.most_texts
        if not expected <= len(texts) <= (most or len(texts)):
            more = " or more" if most is None else f" or {most}" if most > expected else ""
            raise BadRowError(
                f"has {len(texts)} texts, expected {expected}{more} (tabs separate texts)"
            )
        check_texts(texts)
        if kind == TaskKind.MULTIPLE_CHOICE:
            first, *options = texts
            names = labels or [str(number) for number in range(len(options))]
            return Query([(first, option) for option in options], names)
        if kind != TaskKind.CANDIDATES:
            return Query([texts], labels)
        passage, query, *candidates = texts
        if PLACEHOLDER not in query:
            raise BadRowError(f"has no {PLACEHOLDER} in its second text")
        return Query([(passage, query.replace(PLACEHOLDER, c)) for c in candidates], candidates)

    def predict(self, window: Sequence[list[Query]]) -> list[list[Prediction]]:
        """Return the predictions of each input of a window.

        Raises `UserError` when a logit is NaN or infinite.
        """
        inputs = [texts for queries in window for query in queries for texts in query.inputs]
        logits = self._logits(encode_inputs(self.tokenizer, inputs, self.model_config.max_len))
        results: list[list[Prediction]] = []
        start = 0
        for queries in window:
            results.append([])
            for query in queries:
                end = start + len(query.inputs)
                results[-1].append(self._decide(query, logits[start:end]))
                start = end
        return results

    def _logits(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Return the logits [sequences, outputs]."""
        logits = np.empty((len(sequences), self.model_config.num_outputs))
        max_len, pad_id = self.model_config.max_len, self.tokenizer.pad_id
        for batch in token_batches(sequences, self.batch_size, max_len, pad_id):
            found = self.backend.logits(batch.ids, batch.valid_length)
            if found.shape[1:] != logits.shape[1:]:
                raise UserError(
                    f"the model gives {found.shape[-1]} outputs, its configuration says "
                    f"{logits.shape[1]}; restore it"
                )
            logits[batch.indices] = found
        return logits

    def _decide(self, query: Query, logits: np.ndarray) -> Prediction:
        """Turn the logits [inputs, outputs] of one decision into its prediction."""
        if self.model_config.kind == TaskKind.REGRESSION:
            value = self.task.predict(logits) if self.task else logits[:, 0]
            return Prediction(None, float(value[0]), {})
        if self.model_config.kind == TaskKind.CANDIDATES:
            best = int((logits[:, 1] - logits[:, 0]).argmax())
            probabilities = softmax(logits)[:, 1]
        else:
            probabilities = softmax(logits.reshape(-1))
            best = int(probabilities.argmax())
        values = probabilities.tolist()
        return Prediction(query.names[best], values[best], dict(zip(query.names, values)))


def num_texts(model_config: ModelConfig, task: Optional[Task]) -> int:
    """Return the number of texts of an input of a classifier; some take more than that.

    A multiple choice that was converted from another program has no labels: it takes any options.
    """
    if model_config.kind == TaskKind.MULTIPLE_CHOICE:
        return 1 + (len(model_config.labels) or 2)
    if model_config.kind == TaskKind.CANDIDATES:
        return 3
    if model_config.race_cast == "joined":
        return 1 + len(model_config.labels)
    return len(task.text_columns) or 2 if task else 1


def most_texts(
    model_config: ModelConfig, task: Optional[Task], tokenizer: Tokenizer
) -> Optional[int]:
    """Return the largest number of texts of an input; None: any, of candidates and options.

    A classifier that another program has trained does not say whether it takes pairs. One whose
    pairs have our form may, with token types or without.
    """
    kind, labels = model_config.kind, model_config.labels
    if kind == TaskKind.CANDIDATES or (kind == TaskKind.MULTIPLE_CHOICE and not labels):
        return None
    count = num_texts(model_config, task)
    may_take_pairs = task is None and count == 1 and has_our_pairs(model_config, tokenizer)
    return 2 if may_take_pairs else count


def _query_number(example: Example) -> int:
    """Return the number of a ReCoRD candidate's query."""
    assert isinstance(example.uid, tuple)
    return example.uid[0]


def _own_texts(row: Mapping[str, object], columns: Sequence[str]) -> list[str]:
    """Return the texts of a row under our own names; more may follow (text4, ...): candidates."""
    texts = [require_field(row, column, str) for column in columns]
    while len(columns) > 1 and f"text{len(texts) + 1}" in row:
        texts.append(require_field(row, f"text{len(texts) + 1}", str))
    # A dictionary from pandas may have keys that are not strings: ignored, like unknown ones.
    names = (name for name in row if isinstance(name, str))
    numbers = [int(name[4:]) for name in names if re.fullmatch("text[1-9][0-9]{0,5}", name)]
    if len(columns) > 1 and max(numbers) > len(texts):
        raise BadRowError(f"has 'text{max(numbers)}' but no 'text{len(texts) + 1}'")
    return texts


def load_classifier(
    path: Union[str, os.PathLike[str]],
    task: Optional[str] = None,
    runtime: str = "mxnet",
    batch_size: int = BATCH_SIZE,
) -> ClassificationPipeline:
    """Load a saved classifier: its .params file or its folder.

    task: another task that this model predicts, if any (MNLI's predicts AX).
    runtime: one of `bort.inference.runtime.BACKENDS`, or auto: the fastest in float32 that is
        installed.

    Raises `UserError` when there is none, when it is damaged, and for another task than the
    model's.
    """
    path = os.fspath(path)
    found = parameter_file(path)
    model_config = read_model_config(found)
    if model_config.kind == MASKED_LM:
        raise UserError(
            f"{path}: a pretrained model, which predicts no labels: fine-tune it with "
            "finetune_classifier.py, or give --fill_mask"
        )
    model_task = _task(path, model_config, task)
    if runtime == "auto":
        runtime = fastest_runtime(found)
    if runtime == "mxnet":  # reads parameters and tokenizer at the same time
        network, model_config, tokenizer = load_model(found)
        check_finite(found, network)
        backend = backend_for(network, runtime)
    else:
        tokenizer, backend = _load(found, model_config, runtime)
    tokenizer = require_tokenizer(tokenizer, path)
    is_choice = model_config.kind == TaskKind.MULTIPLE_CHOICE
    if is_choice and not has_our_pairs(model_config, tokenizer):
        raise UserError(
            f"{path}: was trained by another program; RoBERTa puts two separators before an "
            "option, this project one"
        )
    return ClassificationPipeline(model_config, tokenizer, backend, model_task, batch_size)


def _load(
    path: str, model_config: ModelConfig, runtime: str
) -> tuple[Optional[Tokenizer], Backend]:
    """Load the tokenizer beside a .params file, and the backend at the same time."""
    if runtime.startswith("mxnet") or runtime not in BACKENDS:
        return load_model_tokenizer(path, model_config), load_runtime(path, runtime)
    with ThreadPoolExecutor(1) as pool, _short_turns():
        backend = pool.submit(load_runtime, path, runtime)  # verifies the files first
        tokenizer = load_model_tokenizer(path, model_config)
        with suppress(ImportError):  # a package that is missing is named by load_runtime
            import_module(package_of(runtime))
        return tokenizer, backend.result()


class _Turns:
    """Short turns, until the last of the loadings that overlap has ended."""

    def __init__(self) -> None:
        self._lock, self._loading, self._before = threading.Lock(), 0, 0.0

    def begin(self) -> None:
        with self._lock:
            if not self._loading:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(1e-4)
            self._loading += 1

    def end(self) -> None:
        with self._lock:
            self._loading -= 1
            if not self._loading:
                sys.setswitchinterval(self._before)


_turns = _Turns()


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads of Python take turns of 0.1 ms, not of 5 ms.

    One that reads files asks for its turn after each piece, and the reading of a tokenizer computes
    in Python all the time.
    """
    _turns.begin()
    try:
        yield
    finally:
        _turns.end()


def _task(path: str, model_config: ModelConfig, name: Optional[str]) -> Optional[Task]:
    """Return the task whose rows are read; raises `UserError` when the model cannot predict it."""
    if not (name or model_config.task):
        return None
    cast = model_config.race_cast or "choices"
    task = get_task(name or model_config.task, race_cast=cast, flag="--task" if name else "task")
    if model_config.task not in (task.name, task.model_task or task.name):
        raise UserError(
            f"--task {task.name}: {path} is a model of {escaped(model_config.task) or 'no task'}"
        )
    check_inputs_version(task, model_config.inputs_version, path)
    return task
