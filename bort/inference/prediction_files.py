"""Files of inputs, of answers, and pipes of both: text, TSV and JSON lines, streamed."""

from __future__ import annotations

import json
import os
import select
import sys
from collections import deque
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Callable, Iterator, Mapping, Optional, Sequence, Union

from bort.errors import UserError
from bort.inference.pipelines import Answer, Input, Placed
from data.rows import BadRowError, Line, decode, line_content, parse_object

READ_BYTES = 1 << 16
INPUT_FORMATS = ("auto", "text", "tsv", "jsonl")
OUTPUT_FORMATS = ("tsv", "json")
EXTENSIONS: Mapping[str, str] = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"}
STANDARD = "-"


class Lines:
    """The lines of a file or pipe, as soon as they are there; no blank ones at the end.

    Raises `UserError` when it cannot be read.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        self._waiting: deque[Line] = deque()
        self._blank: list[Line] = []
        self._rest, self._number, self._ended = b"", 0, False

    def __iter__(self) -> Iterator[Line]:
        """Return itself."""
        return self

    def __next__(self) -> Line:
        """Return the next line, and wait for it."""
        while not self._waiting:
            if self._ended:
                raise StopIteration
            self._read()
        return self._waiting.popleft()

    def ready(self) -> bool:
        """Tell whether there is a next line without waiting for one."""
        while not self._waiting and not self._ended and self._readable():
            self._read()
        return bool(self._waiting)

    def _readable(self) -> bool:
        return bool(select.select([self._descriptor], [], [], 0)[0])

    def _read(self) -> None:
        try:
            chunk = os.read(self._descriptor, READ_BYTES)
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read ({error.strerror})") from None
        *ended, self._rest = (self._rest + chunk).split(b"\n")
        if not chunk:
            ended, self._rest, self._ended = [self._rest], b"", True
        for raw in ended:
            self._number += 1
            content = line_content(raw, first=self._number == 1)
            self._blank.append(Line(f"{self._name}:{self._number}", self._number, content))
            if content:
                self._waiting.extend(self._blank)
                self._blank.clear()


@contextmanager
def opened(path: str) -> Iterator[Lines]:
    """Open a file, or standard input for "-"; raises `UserError` when it cannot be."""
    if path == STANDARD:
        yield Lines(sys.stdin.fileno(), "standard input")
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read ({error.strerror})") from None
    try:
        yield Lines(descriptor, path)
    finally:
        os.close(descriptor)


class Inputs:
    """The inputs that lines hold.

    file_format: text, tsv or jsonl; auto goes by the file's name, else by the first line.
    columns: our names of an input's texts. official: the task's own, empty where it has none.
    Raises `UserError` for a header without the columns.
    """

    def __init__(
        self, lines: Lines, file_format: str, columns: Sequence[str], official: Sequence[str]
    ) -> None:
        self._lines, self.ready = lines, lines.ready
        self._columns, self._official = columns, official
        self._first = next(lines, None)
        self._parse = self._parser(file_format)

    def __iter__(self) -> Iterator[Placed]:
        """Yield the inputs; raises `UserError` at a line that is none."""
        if self._first:
            yield self._placed(self._first)
        for line in self._lines:
            yield self._placed(line)

    def _placed(self, line: Line) -> Placed:
        try:
            if not line.content:
                raise BadRowError("is blank")
            return Placed(line.where, line.number, self._parse(line.content))
        except BadRowError as problem:
            raise UserError(f"{line.where}: {problem}; mend it and start again") from None

    def _parser(self, file_format: str) -> Callable[[bytes], Input]:
        first = self._first
        if first is None:
            return text_input
        fields = first.content.decode("utf-8", "replace").split("\t")
        if file_format == "auto":
            file_format = self._guess(first, fields)
        if file_format == "jsonl":
            return parse_object
        if file_format == "text":
            return text_input
        if not self._is_header(fields):
            named = " and ".join(self._official or self._columns)
            raise UserError(
                f"{first.where}: the header has no column {named}; name the columns so or "
                f"{' and '.join(self._columns)}, or give --input_format text"
            )
        self._first = None
        return lambda content: table_input(content, fields)

    def _guess(self, first: Line, fields: Sequence[str]) -> str:
        extension = os.path.splitext(first.where.rpartition(":")[0])[1].lower()
        if extension in EXTENSIONS:
            return EXTENSIONS[extension]
        if first.content.startswith(b'{"'):
            return "jsonl"
        return "tsv" if self._is_header(fields) else "text"

    def _is_header(self, fields: Sequence[str]) -> bool:
        named = (self._columns, self._official) if self._official else (self._columns,)
        return any(set(names) <= set(fields) for names in named)


def text_input(content: bytes) -> list[str]:
    """Return the texts of a line, with tabs between them."""
    return decode(content).split("\t")


def table_input(content: bytes, columns: Sequence[str]) -> dict[str, str]:
    """Return a line of a table by its columns."""
    fields = decode(content).split("\t")
    if len(fields) != len(columns):
        raise BadRowError(f"expected {len(columns)} columns, found {len(fields)}")
    return dict(zip(columns, fields))


# ---- answers -------------------------------------------------------------------------------------

Found = Union[Answer, tuple]


@contextmanager
def written(path: Optional[str]) -> Iterator[BinaryIO]:
    """Yield standard output, or a file that has its name only when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as handle:
            yield handle
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)


def table_line(found: Found) -> str:
    """Return an answer as label and probability, as a score, or as five words with theirs."""
    if isinstance(found, Answer):
        cells = [] if found.label is None else [_cell(found.label)]
        return "\t".join([*cells, f"{found.value:.4f}"])
    return "\t".join(f"{_cell(word.text)}\t{word.probability:.4f}" for word in found)


def _cell(text: str) -> str:
    return " ".join(text.split())


def json_line(number: int, found: Found) -> str:
    """Return an answer as a JSON object with the number of the line that it answers."""
    content: dict[str, Any] = {"line": number}
    if not isinstance(found, Answer):
        content["words"] = [
            {"word": word.text, "token": word.token, "probability": _digits(word.probability)}
            for word in found
        ]
    elif found.label is None:
        content["score"] = _digits(found.value)
    else:
        content["label"], content["probability"] = found.label, _digits(found.value)
        content["probabilities"] = {n: _digits(p) for n, p in found.probabilities.items()}
    return json.dumps(content, ensure_ascii=False)


def _digits(value: float) -> float:
    """Round to six digits: float32 has no more."""
    return float(f"{value:.6g}")
