"""Inputs and predictions in files and pipes: text, TSV and JSON lines, streamed."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections import deque
from contextlib import contextmanager
from typing import IO, Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

from bort.errors import UserError
from bort.files import atomic_write, remove_left_overs_of
from bort.inference.base import Input, InputSchema, Located, Pipeline, invalid_input, predictions
from bort.inference.classification import Prediction
from bort.inference.masked_lm import MaskPrediction
from bort.types import JSONObject
from data.rows import BadRowError, Line, decode, line_content, parse_object

READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 24
INPUT_FORMATS = ("auto", "text", "tsv", "jsonl")
OUTPUT_FORMATS = ("tsv", "json")
EXTENSIONS: Mapping[str, str] = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"}
STDIN = "-"
# How JSON begins; as a list or over several lines it is refused.
_JSON = re.compile(rb'\s*(?:\[?\s*\{\s*"|(?:\[|\[?\s*\{)\s*$)')


def predict_file(
    load: Callable[[], Pipeline[Any, Any]],
    source: str,
    output: Optional[str],
    input_format: str,
    output_format: str,
) -> int:
    """Predict every line of a file as it comes; returns the number of predictions.

    load: loads the model, once input and output are open.
    source: a file, or "-" for standard input; output: a file, None for standard output.

    Raises `UserError` for files that cannot be opened and for an invalid line; then an output file
    is not written.
    """
    count = 0
    form = format_json if output_format == "json" else format_tsv
    with open_input(source) as lines, open_output(output) as stream:
        pipeline = load()
        inputs = InputReader(lines, input_format, pipeline.schema)
        for window in predictions(pipeline, inputs, inputs.ready):
            for number, result in window:
                stream.write(f"{form(number, result)}\n".encode())
            stream.flush()
            count += len(window)
    return count


# ---- inputs --------------------------------------------------------------------------------------


class LineReader:
    """The lines of a file or pipe, as soon as they are there, without blank lines at the end.

    Raises `UserError` when it cannot be read and for a line of more than `MAX_LINE_BYTES`.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        self._waiting: deque[Line] = deque()
        self._blank: Optional[Line] = None  # the first of the blank lines read last
        self._pending: list[bytes] = []  # the pieces of the line that has not ended
        self._pending_bytes, self._number, self._ended = 0, 0, False

    def __iter__(self) -> Iterator[Line]:
        """Return itself."""
        return self

    def __next__(self) -> Line:
        """Return the next line, waiting for it."""
        while not self._waiting:
            if self._ended:
                raise StopIteration
            self._read()
        return self._waiting.popleft()

    def ready(self) -> bool:
        """Return whether there is a next line without waiting for one."""
        while not self._waiting and not self._ended and self._readable():
            self._read()
        return bool(self._waiting)

    def _readable(self) -> bool:
        return bool(select.select([self._descriptor], [], [], 0)[0])

    def _read(self) -> None:
        try:
            chunk = os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:  # a program that shares the stream has made it so
            select.select([self._descriptor], [], [])
            return
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read ({error.strerror})") from None
        first, *others = chunk.split(b"\n")
        self._pending.append(first)
        self._pending_bytes += len(first)
        if self._pending_bytes > MAX_LINE_BYTES:
            raise UserError(
                f"{self._name}:{self._number + 1}: the line is longer than "
                f"{MAX_LINE_BYTES >> 20} MiB; expected text, TSV or JSON lines"
            )
        if others or not chunk:
            self._add(b"".join(self._pending))
            for raw in others[:-1]:
                self._add(raw)
            self._pending = others[-1:]
            self._pending_bytes = sum(map(len, self._pending))
        self._ended = not chunk

    def _add(self, raw: bytes) -> None:
        self._number += 1
        content = line_content(raw, first=self._number == 1)
        line = Line(f"{self._name}:{self._number}", self._number, content)
        if not content:
            self._blank = self._blank or line
            return
        if self._blank:  # a blank line between others is an error: the first one is enough
            self._waiting.append(self._blank)
            self._blank = None
        self._waiting.append(line)


@contextmanager
def open_input(path: str) -> Iterator[LineReader]:
    """Open a file, or standard input for "-"; raises `UserError` when it cannot be read."""
    if path == STDIN:
        if sys.__stdin__ is None:  # Python's sign that it was closed when the program started
            raise UserError("standard input is closed; give --input FILE")
        yield LineReader(sys.stdin.fileno(), "standard input")
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read ({error.strerror})") from None
    try:
        yield LineReader(descriptor, path)
    finally:
        os.close(descriptor)


class LineFormat(NamedTuple):
    """How lines are parsed. guessed: by the first line alone, so that it may be wrong."""

    parse: Callable[[bytes], Input]
    guessed: bool = False


class InputReader:
    """The inputs that lines contain.

    file_format: text, tsv or jsonl; auto decides by the file's name, else by the first line.

    Raises `UserError` for a header without the columns and for an invalid line.
    """

    def __init__(self, lines: LineReader, file_format: str, schema: InputSchema) -> None:
        self._lines, self.ready = lines, lines.ready
        self._schema = schema
        self._first = next(lines, None)
        self._format = self._detect(file_format)

    def __iter__(self) -> Iterator[Located]:
        """Yield the inputs."""
        if self._first:
            yield self._located(self._first)
        for line in self._lines:
            yield self._located(line)

    def _located(self, line: Line) -> Located:
        try:
            if not line.content:
                raise BadRowError("is blank")
            content = self._format.parse(line.content)
            return Located(line.where, line.number, content, len(line.content))
        except BadRowError as problem:
            if self._format.guessed and line is self._first:
                raise UserError(
                    f"{line.where}: {problem}; for plain text give --input_format text"
                ) from None
            raise invalid_input(line.where, problem) from None

    def _detect(self, file_format: str) -> LineFormat:
        first = self._first
        if first is None:
            return LineFormat(text_input)
        fields = first.content.decode("utf-8", "replace").split("\t")
        guessed = file_format == "auto"
        if guessed:
            path = first.where.rpartition(":")[0]
            extension = os.path.splitext(path)[1].lower()
            if extension == ".csv":  # each line would be taken for a text, its header too
                raise UserError(
                    f"{path}: CSV is not read; convert it to TSV or JSON lines, or give "
                    "--input_format text if each line is a text"
                )
            guessed = extension not in EXTENSIONS
            file_format = EXTENSIONS.get(extension) or self._guess(first, fields)
        if file_format == "jsonl":
            return LineFormat(parse_object, guessed)
        if file_format == "text":
            return LineFormat(text_input)
        return LineFormat(self._table(first, fields))

    def _guess(self, first: Line, fields: Sequence[str]) -> str:
        if _JSON.match(first.content):
            return "jsonl"
        return "tsv" if self._is_header(fields) or self._is_headerless(fields) else "text"

    def _table(self, first: Line, fields: list[str]) -> Callable[[bytes], Input]:
        if self._is_header(fields):
            self._first = None
            columns: Sequence[str] = fields
            if len(set(fields)) < len(fields):
                raise UserError(f"{first.where}: the header has a column twice; rename one")
        elif self._is_headerless(fields):
            columns = self._schema.headerless
        else:
            known = dict.fromkeys(filter(None, (self._schema.official, self._schema.columns)))
            wanted = ", or ".join(" and ".join(columns) for columns in known)
            raise UserError(
                f"{first.where}: the header has no column {wanted}; rename its columns, or give "
                "--input_format text"
            )
        return lambda content: table_input(content, columns)

    def _is_header(self, fields: Sequence[str]) -> bool:
        names = {self._schema.aliases.get(field, field) for field in fields}
        known = (self._schema.columns, self._schema.official)
        return any(columns and set(columns) <= names for columns in known)

    def _is_headerless(self, fields: Sequence[str]) -> bool:
        return len(self._schema.headerless) == len(fields) > 0


def text_input(content: bytes) -> list[str]:
    """Return the texts of a line, separated by tabs."""
    return decode(content).split("\t")


def table_input(content: bytes, columns: Sequence[str]) -> dict[str, str]:
    """Return a line of a table by its columns."""
    fields = decode(content).split("\t")
    if len(fields) != len(columns):
        raise BadRowError(f"expected {len(columns)} columns, found {len(fields)}")
    return dict(zip(columns, fields))


# ---- predictions ---------------------------------------------------------------------------------

Result = Union[Prediction, "tuple[MaskPrediction, ...]"]


@contextmanager
def open_output(path: Optional[str]) -> Iterator[IO]:
    """Open a file, which appears when it is complete, or standard output for None.

    A device or a FIFO is written to as it is, a symbolic link followed; raises `UserError` for a
    folder.
    """
    if path is None:
        yield sys.stdout.buffer
        return
    remove_left_overs_of(path)
    with atomic_write(path, "wb") as stream:
        yield stream


def format_tsv(_: int, result: Result) -> str:
    """Return a prediction as label and probability, as a score, or as five words with theirs."""
    if isinstance(result, Prediction):
        cells = [] if result.label is None else [_cell(result.label)]
        return "\t".join([*cells, f"{result.value:.4f}"])
    return "\t".join(f"{_cell(word.text)}\t{word.probability:.4f}" for word in result)


def _cell(text: str) -> str:
    return " ".join(text.split())


def format_json(number: int, result: Result) -> str:
    """Return a prediction as a JSON object with the number of its input line."""
    content: JSONObject = {"line": number}
    if not isinstance(result, Prediction):
        content["words"] = [
            {"word": word.text, "token": word.token, "probability": _rounded(word.probability)}
            for word in result
        ]
    elif result.label is None:
        content["score"] = _rounded(result.value)
    else:
        content["label"], content["probability"] = result.label, _rounded(result.value)
        content["probabilities"] = {n: _rounded(p) for n, p in result.probabilities.items()}
    return json.dumps(content, ensure_ascii=False)


def _rounded(value: float) -> float:
    """Round to six significant digits: float32 has no more."""
    return float(f"{value:.6g}")
