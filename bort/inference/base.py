"""What both pipelines share: inputs in windows, padded batches, checks of texts.

Inputs stream through in windows: a window is sorted by length, run in batches and answered in the
order of the input before the next one is read. The first windows are small, and no window waits
for input that is not there yet.
"""

from __future__ import annotations

import re
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Protocol,
    Sequence,
    TypeVar,
    Union,
)

import numpy as np

from bort.errors import UserError, quoted
from bort.types import JSONMapping
from data.batches import pad
from data.rows import BadRowError

BATCH_SIZE = 32
# Inputs, and bytes of input lines, that are read and sorted by length before any is predicted.
WINDOW, WINDOW_BYTES = 512, 1 << 24
# Batches are padded to multiples of it: MXNet plans memory for every new shape, and keeps the plan.
PAD_MULTIPLE = 8
_SURROGATE = re.compile("[\ud800-\udfff]")

# One text, the texts of one input, or a row of the task's official files.
Input = Union[str, Sequence[str], JSONMapping]
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class Located(NamedTuple):
    """An input, its location for messages, its number there, and its size in bytes if known."""

    where: str
    number: int
    content: Input
    size: int = 0


class InputSchema(NamedTuple):
    """The names of an input's texts in tables and JSON objects.

    columns: our own, `text` or `text1`, `text2`, ...
    official: the task's, empty where its rows are not texts as they are.
    headerless: all columns of the task's official files without a header; empty if they have one.
    aliases: {other spelling in official files: name in `official`}.
    """

    columns: tuple[str, ...]
    official: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}


class Pipeline(Protocol[Prepared, Result]):
    """A model with its tokenizer: `prepare` each input, `predict` a window of them."""

    @property
    def schema(self) -> InputSchema:
        """The names of an input's texts."""

    def prepare(self, content: Input) -> Prepared:
        """Convert one input into the model's form; raises `BadRowError` when it is not valid."""

    def predict(self, window: Sequence[Prepared]) -> list[list[Result]]:
        """Return the predictions of each input; an official row may have several."""


def locate(inputs: Iterable[Input]) -> Iterator[Located]:
    """Number inputs that come from Python.

    Raises `UserError` for one text or one row in place of a list: it would be taken apart.
    """
    if isinstance(inputs, (str, bytes, Mapping)):
        raise UserError("inputs: expected a list of inputs, found a single one; put it into a list")
    for number, content in enumerate(inputs, 1):
        yield Located(f"input {number}", number, content)


def always_ready() -> bool:
    """Return True: the next input is there without waiting."""
    return True


def predictions(
    pipeline: Pipeline[Any, Result],
    inputs: Iterable[Located],
    ready: Callable[[], bool] = always_ready,
) -> Iterator[list[tuple[int, Result]]]:
    """Yield, window by window, each prediction with the number of its input, in order.

    ready: returns whether the next input is there without waiting; if not, those read so far are
        answered first.

    Raises `UserError` that locates an invalid input.
    """
    for window in windows(inputs, ready):
        prepared = [_prepare(pipeline, item) for item in window]
        results = pipeline.predict(prepared)
        yield [(item.number, result) for item, some in zip(window, results) for result in some]


def _prepare(pipeline: Pipeline[Prepared, Any], item: Located) -> Prepared:
    try:
        return pipeline.prepare(item.content)
    except BadRowError as problem:
        raise invalid_input(item.where, problem) from None


def invalid_input(where: str, problem: BadRowError) -> UserError:
    """Return the error for an input that is not valid."""
    return UserError(f"{where}: {problem}; fix the line and rerun")


def windows(inputs: Iterable[Located], ready: Callable[[], bool]) -> Iterator[list[Located]]:
    """Yield windows of 1, 2, 4, ... `WINDOW` inputs; fewer where the next input is not there."""
    limit, size, window = 1, 0, []
    for item in inputs:
        window.append(item)
        size += item.size
        if len(window) == limit or size >= WINDOW_BYTES or not ready():
            yield window
            limit, size, window = min(2 * limit, WINDOW), 0, []
    if window:
        yield window


# ---- texts ---------------------------------------------------------------------------------------


def numbered_columns(count: int) -> tuple[str, ...]:
    """Return text, or text1, text2, ..."""
    return ("text",) if count == 1 else tuple(f"text{number}" for number in range(1, count + 1))


def texts_of(content: Any) -> list[str]:
    """Return the texts of an input that is no row: one, or a sequence of several.

    Raises `BadRowError` for what is not a text, such as the NaN of an empty cell in pandas.
    """
    one = isinstance(content, (str, bytes)) or not isinstance(content, Iterable)
    texts: list[Any] = [content] if one else list(content)
    for text in texts:
        if not isinstance(text, str):
            raise BadRowError(f"is {quoted(text)}, expected text")
    return texts


def check_texts(texts: Iterable[str]) -> None:
    """Raise `BadRowError` when a text is blank or holds half of a surrogate pair."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise BadRowError(f"has an empty text (number {number})")
        if _SURROGATE.search(text):
            raise BadRowError(
                f"text {number} contains half of a surrogate pair, which is not a character"
            )


# ---- batches -------------------------------------------------------------------------------------


class TokenBatch(NamedTuple):
    """Padded sequences: ids [n, length], valid_length [n], and the index [n] of each sequence."""

    ids: np.ndarray
    valid_length: np.ndarray
    indices: np.ndarray


def token_batches(
    sequences: Sequence[np.ndarray], batch_size: int, max_len: int, pad_id: int
) -> Iterator[TokenBatch]:
    """Yield sequences of token ids in batches of similar lengths, the longest first.

    The memory that a batch has freed is enough for a shorter one, not for a longer one.

    Raises `UserError` for a batch size below 1, which would leave sequences without an answer.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: expected 1 or more")
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(sequences), batch_size):
        indices = order[start : start + batch_size]
        longest = int(lengths[indices[0]])
        width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(max_len, longest))
        yield TokenBatch(*pad([sequences[index] for index in indices], pad_id, width), indices)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
