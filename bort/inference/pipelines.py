"""What a saved model says of new text: classes with probabilities, or words for `<mask>`.

    for answer in predict("runs/finetuning/SST-2", ["a fine film", "a bore"]):
        print(answer.label, answer.value)

Inputs stream through in windows: one is sorted by length, scored in batches and answered in order
before the next is read. The first windows are small, and none waits for what is not there yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
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
    TypeVar,
    Union,
)

import numpy as np

from bort.errors import UserError
from bort.parameters import parameter_file
from bort.tokenization import TOKENIZER_FOLDER, Tokenizer
from bort.types import TaskKind
from data.batches import pad
from data.encoding import encode_inputs
from data.rows import BadRowError, require_field
from data.task import Task
from data.tasks import check_inputs_version, get_task

MASK = "<mask>"
PLACEHOLDER = "@placeholder"
WORDS = 5  # for each mask
BATCH = 32
# Inputs that are read, sorted by length and scored before any of them is answered.
WINDOW = 512
# Batches have lengths that are multiples of it: MXNet plans every new shape anew, and keeps it.
LENGTH_STEP = 8

# One text, the texts of one input, or a row of the task's official files.
Input = Union[str, Sequence[str], Mapping[str, Any]]


class Answer(NamedTuple):
    """What a classifier says of one input.

    label: the class, option or candidate; None for regression.
    value: the label's probability; for regression the score.
    probabilities: of every class, option or candidate; empty for regression.
    """

    label: Optional[str]
    value: float
    probabilities: Mapping[str, float]


class Word(NamedTuple):
    """A word for a mask: as text, as the vocabulary spells it, and how probable it is."""

    text: str
    token: str
    probability: float


Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class Predictor(Protocol[Prepared, Result]):
    """A model that is asked: `prepare` one input after another, `answer` a window of them."""

    def prepare(self, content: Input) -> Prepared:
        """Bring one input into the model's form; raises `BadRowError` for what is none."""

    def answer(self, window: Sequence[Prepared]) -> list[list[Result]]:
        """Return the answers of each input: one, or more where an official row asks more."""


def predict(
    model: Union[str, Classifier],
    inputs: Iterable[Input],
    *,
    task: Optional[str] = None,
    runtime: str = "mxnet",
    batch_size: int = BATCH,
) -> Iterator[Answer]:
    """Yield the answer of each input, in order; a row that asks several things has several.

    model: a saved classifier's .params file or folder, or a loaded `Classifier`.
    inputs: texts, sequences of texts (of a pair; of a choice the common text and the options; of
        ReCoRD passage, query with "@placeholder" and the candidates) or rows of the task's
        official files as dictionaries.
    runtime: one of `bort.inference.runtime.BACKENDS`.
    Raises `UserError` for a path that holds no classifier, a wrong task, and a wrong input.
    """
    if isinstance(model, str):
        model = load_classifier(model, task, runtime, batch_size)
    for window in answers(model, _placed(inputs)):
        yield from (answer for _, answer in window)


def fill_mask(
    model: Union[str, MaskFiller], texts: Iterable[Input], *, batch_size: int = BATCH
) -> Iterator[tuple[Word, ...]]:
    """Yield the five most probable words of each `<mask>` of each text, in order.

    model: a pretraining run, a checkpoint, a saved model, or a loaded `MaskFiller`.
    Raises `UserError` for a path that holds no pretrained model and for a text without a mask.
    """
    if isinstance(model, str):
        model = load_mask_filler(model, batch_size)
    for window in answers(model, _placed(texts)):
        yield from (words for _, words in window)


class Placed(NamedTuple):
    """An input, where it stands (for messages) and its number there."""

    where: str
    number: int
    content: Input


def _placed(inputs: Iterable[Input]) -> Iterator[Placed]:
    for number, content in enumerate(inputs, 1):
        yield Placed(f"input {number}", number, content)


def always() -> bool:
    """Tell that the next input can be had without waiting."""
    return True


def answers(
    predictor: Predictor[Any, Result],
    inputs: Iterable[Placed],
    ready: Callable[[], bool] = always,
) -> Iterator[list[tuple[int, Result]]]:
    """Yield, window by window, the answers of each input with its number, in order.

    `ready` tells whether the next input can be had without waiting: else those at hand are
    answered first. Raises `UserError` that says where a wrong input stands.
    """
    for window in windows(inputs, ready):
        prepared = [_prepare(predictor, one) for one in window]
        found = predictor.answer(prepared)
        yield [(one.number, answer) for one, some in zip(window, found) for answer in some]


def _prepare(predictor: Predictor[Prepared, Any], one: Placed) -> Prepared:
    try:
        return predictor.prepare(one.content)
    except BadRowError as problem:
        raise UserError(f"{one.where}: {problem}; mend it and start again") from None


def windows(inputs: Iterable[Placed], ready: Callable[[], bool]) -> Iterator[list[Placed]]:
    """Yield the inputs in windows of 1, 2, 4, ... `WINDOW`, less where the next is not there."""
    size, window = 1, []
    for one in inputs:
        window.append(one)
        if len(window) == size or not ready():
            yield window
            size, window = min(2 * size, WINDOW), []
    if window:
        yield window


# ---- classifiers ---------------------------------------------------------------------------------


class Question(NamedTuple):
    """One thing to decide: its encoder inputs, and the names of what there is to choose from."""

    inputs: Sequence[Sequence[str]]
    names: Sequence[str]


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier.

    model_config: a bort.saved_model.ModelConfig. runtime: a bort.inference.runtime.Backend.
    task: the model's task, or another that it can predict; None for a model of no task.
    """

    model_config: Any
    tokenizer: Tokenizer
    runtime: Any
    task: Optional[Task]
    batch_size: int = BATCH

    @property
    def fields(self) -> int:
        """Return of how many texts an input is made; of candidates there may be more."""
        if self.model_config.kind == TaskKind.MULTIPLE_CHOICE:
            return 1 + len(self.model_config.labels)
        if self.model_config.kind == TaskKind.CANDIDATES:
            return 3
        if self.model_config.race_cast == "joined":
            return 1 + len(self.model_config.labels)
        return len(self.task.text_columns) or 2 if self.task else 1

    @property
    def columns(self) -> tuple[str, ...]:
        """Return our names of these texts: text, or text1, text2, ..."""
        return numbered(self.fields)

    @property
    def official_columns(self) -> tuple[str, ...]:
        """Return the task's own names of these texts; none where a cast makes the texts."""
        return self.task.text_columns if self.task else ()

    def prepare(self, content: Input) -> list[Question]:
        """Return what is asked: one question, or each that an official row asks.

        Raises `BadRowError` for another number of texts and for what is no row of the task.
        """
        if isinstance(content, Mapping):
            texts = own_texts(content, self.columns)
            if texts is None:
                return self._official(content)
        else:
            texts = [content] if isinstance(content, str) else list(content)
        return [self._question([text.strip() for text in texts])]

    def _official(self, row: Mapping[str, Any]) -> list[Question]:
        if self.task is None:
            raise BadRowError(f"has no {self.columns[0]!r}")
        examples = self.task.cast_row(row, 0)
        if self.model_config.kind == TaskKind.CANDIDATES:
            queries = groupby(examples, lambda one: _query(one.uid))
            groups = [list(query) for _, query in queries]
            return [
                Question([e.inputs[0] for e in group], [e.candidate for e in group])
                for group in groups
            ]
        return [Question(example.inputs, self.model_config.labels) for example in examples]

    def _question(self, texts: Sequence[str]) -> Question:
        kind, labels = self.model_config.kind, self.model_config.labels
        least = self.fields
        if len(texts) < least or (len(texts) > least and kind != TaskKind.CANDIDATES):
            raise BadRowError(
                f"holds {len(texts)} instead of {least} (texts have a tab between them)"
            )
        if not all(texts):
            raise BadRowError(f"has an empty text (number {texts.index('') + 1})")
        if kind == TaskKind.MULTIPLE_CHOICE:
            return Question([(texts[0], option) for option in texts[1:]], labels)
        if kind != TaskKind.CANDIDATES:
            return Question([texts], labels)
        passage, query, *candidates = texts
        if PLACEHOLDER not in query:
            raise BadRowError(f"has no {PLACEHOLDER} in its second text")
        return Question([(passage, query.replace(PLACEHOLDER, c)) for c in candidates], candidates)

    def answer(self, window: Sequence[list[Question]]) -> list[list[Answer]]:
        """Return the answers to a window's questions."""
        inputs = [one for asked in window for question in asked for one in question.inputs]
        scores = self._scores(encode_inputs(self.tokenizer, inputs, self.model_config.max_len))
        found: list[list[Answer]] = []
        start = 0
        for asked in window:
            found.append([])
            for question in asked:
                end = start + len(question.inputs)
                found[-1].append(self._decide(question, scores[start:end]))
                start = end
        return found

    def _scores(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        scores = np.empty((len(rows), self.model_config.num_outputs))
        for batch in batches(
            rows, self.batch_size, self.model_config.max_len, self.tokenizer.pad_id
        ):
            scores[batch.rows] = self.runtime.logits(batch.ids, batch.valid_length)
        return scores

    def _decide(self, question: Question, scores: np.ndarray) -> Answer:
        """Turn the scores [inputs, outputs] of one question into its answer."""
        if self.model_config.kind == TaskKind.REGRESSION:
            value = self.task.predict(scores) if self.task else scores[:, 0]
            return Answer(None, float(value[0]), {})
        if self.model_config.kind == TaskKind.CANDIDATES:
            best = int((scores[:, 1] - scores[:, 0]).argmax())
            probabilities = softmax(scores)[:, 1]
        else:
            probabilities = softmax(scores.reshape(-1))
            best = int(probabilities.argmax())
        values = probabilities.tolist()
        return Answer(question.names[best], values[best], dict(zip(question.names, values)))


def _query(uid: Any) -> int:
    return uid[0]


def numbered(count: int) -> tuple[str, ...]:
    """Return text, or text1, text2, ..."""
    return ("text",) if count == 1 else tuple(f"text{number}" for number in range(1, count + 1))


def own_texts(row: Mapping[str, Any], columns: Sequence[str]) -> Optional[list[str]]:
    """Return the texts that a row holds under our own names, None when it has other ones.

    Behind the last of `columns` (text1, text2, ...) more may follow: of candidates.
    """
    if columns[0] not in row:
        return None
    texts = [require_field(row, column, str) for column in columns]
    while len(columns) > 1 and f"text{len(texts) + 1}" in row:
        texts.append(require_field(row, f"text{len(texts) + 1}", str))
    return texts


def load_classifier(
    path: str, task: Optional[str] = None, runtime: str = "mxnet", batch_size: int = BATCH
) -> Classifier:
    """Load a saved classifier: its .params file or its folder.

    `task` names, if need be, another task that this model predicts (MNLI's predicts AX).
    Raises `UserError` when there is none, and for another task than the model's.
    """
    from bort import saved_model
    from bort.inference.runtime import backend_for, load_runtime

    found = parameter_file(path)
    model_config = saved_model.read_model_config(found)
    if model_config.kind == saved_model.MASKED_LM:
        raise UserError(
            f"{path}: a pretrained model, which has no answers of its own: fine-tune it with "
            "finetune_classifier.py, or give --fill_mask"
        )
    asked = _task(path, model_config, task)
    if runtime == "mxnet":  # loads the tokenizer beside the parameters, at the same time
        network, model_config, tokenizer = saved_model.load_model(found)
        loaded = backend_for(network, runtime)
    else:
        tokenizer = saved_model.load_model_tokenizer(found, model_config)
        loaded = load_runtime(found, runtime)
    return Classifier(model_config, _present(tokenizer, path), loaded, asked, batch_size)


def _task(path: str, model_config: Any, name: Optional[str]) -> Optional[Task]:
    """Return the task to read rows of; raises `UserError` when the model is not of it."""
    if not (name or model_config.task):
        return None
    try:
        task = get_task(name or model_config.task, race_cast=model_config.race_cast or "choices")
    except UserError as error:
        raise UserError(str(error).replace("--task_name", "--task")) from None
    if model_config.task not in (task.name, task.model_task):
        raise UserError(
            f"--task {task.name}: {path} is a model of {model_config.task or 'no task'}"
        )
    check_inputs_version(task, model_config.inputs_version, path)
    return task


def _present(tokenizer: Optional[Tokenizer], path: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{path}: has no {TOKENIZER_FOLDER}/ beside it; restore it")
    return tokenizer


# ---- masks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskFiller:
    """A loaded pretrained model."""

    model_config: Any
    tokenizer: Tokenizer
    network: Any
    batch_size: int = BATCH
    fields: int = 1
    columns: tuple[str, ...] = ("text",)
    official_columns: tuple[str, ...] = ()

    def prepare(self, content: Input) -> np.ndarray:
        """Return the ids of a text, int32; `<mask>` becomes one of them.

        Raises `BadRowError` for a text without mask and one longer than the model's positions.
        """
        if isinstance(content, Mapping):
            content = require_field(content, "text", str)
        if not isinstance(content, str):
            if len(content) != 1:
                raise BadRowError(f"has {len(content)} texts, where 1 belongs")
            content = content[0]
        if MASK not in content:
            raise BadRowError(f"has no {MASK} where a word is missing")
        ids = mask_ids(self.tokenizer, content.strip())
        if len(ids) > self.model_config.max_len:
            raise BadRowError(
                f"has {len(ids)} tokens, where the model takes {self.model_config.max_len}"
            )
        return ids

    def answer(self, window: Sequence[np.ndarray]) -> list[list[tuple[Word, ...]]]:
        """Return, for each text, the words of each mask."""
        found: list[list[tuple[Word, ...]]] = [[] for _ in window]
        pad_id = self.tokenizer.pad_id
        for batch in batches(window, self.batch_size, self.model_config.max_len, pad_id):
            rows, columns = np.nonzero(batch.ids == self.tokenizer.mask_id)
            positions = rows * batch.ids.shape[1] + columns
            probabilities = mask_probabilities(
                self.network, batch.ids, batch.valid_length, positions
            )
            for row, values in zip(rows, probabilities):
                found[batch.rows[row]].append(self._words(values))
        return found

    def _words(self, probabilities: np.ndarray) -> tuple[Word, ...]:
        """Return the most probable words; a special token is none, as a mask never hides one."""
        probabilities[self.tokenizer.special_ids] = -1
        best = np.argpartition(-probabilities, WORDS)[:WORDS]
        best = best[np.argsort(-probabilities[best], kind="stable")]
        words = []
        for index in best.tolist():
            token = self.tokenizer.tokens([index])[0]
            text = self.tokenizer.decode([index]).strip()
            # A token of blanks or of a part of a character is shown as it is spelt.
            readable = text and "\ufffd" not in text
            words.append(Word(text if readable else token, token, float(probabilities[index])))
        return tuple(words)


def mask_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of a text with its `<mask>`s, int32, between `<s>` and `</s>`.

    A mask stands for a whole token, which has the space before it in it.
    """
    first, *others = text.split(MASK)
    parts = [[tokenizer.bos_id], tokenizer.encode(first.rstrip())]
    for place, piece in enumerate(others, 1):
        text = piece.rstrip() if place < len(others) else piece
        parts += [[tokenizer.mask_id], tokenizer.encode_continued(text)]
    return np.concatenate([*parts, [tokenizer.eos_id]]).astype(np.int32)


def load_mask_filler(path: str, batch_size: int = BATCH) -> MaskFiller:
    """Load a pretrained model: a run, a checkpoint, or a saved model.

    Raises `UserError` when there is none.
    """
    from bort import saved_model

    found = parameter_file(path)
    model_config = saved_model.read_model_config(found)
    if model_config.kind != saved_model.MASKED_LM:
        raise UserError(
            f"--fill_mask: {path} is a model of {model_config.task or model_config.kind}; "
            "give a pretrained one"
        )
    network, model_config, tokenizer = saved_model.load_model(found)
    network.encoder.hybridize()
    return MaskFiller(model_config, _present(tokenizer, path), network, batch_size)


def mask_probabilities(
    network: Any, ids: np.ndarray, valid_length: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Return the probabilities [masks, vocabulary] at positions of the flattened grid of `ids`."""
    from mxnet import nd

    from bort.bort import decode, encode, masked_hidden

    arrays = (nd.array(one, dtype="float32") for one in (ids, valid_length))
    hidden = masked_hidden(network, encode(network, *arrays), nd.array(positions, dtype="int32"))
    return nd.softmax(decode(network, hidden), axis=-1).asnumpy()


# ---- batches -------------------------------------------------------------------------------------


class TokenBatch(NamedTuple):
    """Padded rows: ids [n, length] and valid_length [n], int32; which rows they are [n]."""

    ids: np.ndarray
    valid_length: np.ndarray
    rows: np.ndarray


def batches(
    rows: Sequence[np.ndarray], batch_size: int, max_len: int, pad_id: int
) -> Iterator[TokenBatch]:
    """Yield rows of ids, in batches of similar lengths of at most `max_len`."""
    lengths = np.array([len(row) for row in rows], np.int32)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        longest = int(lengths[chosen[-1]])
        width = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max(max_len, longest))
        ids, valid_length = pad([rows[index] for index in chosen], pad_id, width)
        yield TokenBatch(ids, valid_length, chosen)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
