"""Rows of the official files: UTF-8, one line each; every broken row is named or counted.

Lines end at LF or CRLF only. The tasks' texts contain other characters (U+2028, U+0085) that
`str.splitlines` would take for line ends.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Protocol, TypeVar

from bort.errors import UserError, escaped, quoted
from bort.files import WHOLE_BYTES, open_regular
from bort.types import JSONMapping, JSONObject


class Located(Protocol):
    """A row that knows its file and line."""

    @property
    def where(self) -> str:
        """File and line for messages, as "file:line"."""


Item = TypeVar("Item")
Value = TypeVar("Value")
Row = TypeVar("Row", bound=Located)


class BadRowError(Exception):
    """Says what is wrong with one row; `collect` adds the file and the line."""


class Line(NamedTuple):
    """One line of a file: `where` is "file:line" for messages, `number` counts from 1."""

    where: str
    number: int
    content: bytes


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file without line ends, byte order mark and blank lines at its end.

    Raises `UserError` when the file cannot be read.
    """
    blank: list[Line] = []
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            for number, raw in enumerate(handle, 1):
                line = Line(f"{path}:{number}", number, line_content(raw, first=number == 1))
                if not line.content:
                    blank.append(line)
                    continue
                yield from blank
                blank.clear()
                yield line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def line_content(raw: bytes, first: bool) -> bytes:
    """Return a line without its end; the first line of a file without a byte order mark."""
    marked = first and raw.startswith(codecs.BOM_UTF8)
    return raw[len(codecs.BOM_UTF8) if marked else 0 :].rstrip(b"\r\n")


def read_submission_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a leaderboard's file without their LF; all else stays for the checks."""
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            for number, raw in enumerate(handle, 1):
                content = raw[:-1] if raw.endswith(b"\n") else raw
                yield Line(f"{path}:{number}", number, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def submission_text(line: Line) -> str:
    """Decode a line of a leaderboard's file.

    Raises `BadRowError` for a byte order mark, CRLF, a blank line and what is not UTF-8.
    """
    if line.number == 1 and line.content.startswith(codecs.BOM_UTF8):
        raise BadRowError("starts with a byte order mark")
    if line.content.endswith(b"\r"):
        raise BadRowError("ends with CRLF instead of LF")
    if not line.content.strip():
        raise BadRowError("is blank")
    return decode(line.content)


def submission_object(line: Line) -> JSONObject:
    """Parse a line of a leaderboard's file as one JSON object.

    Raises `BadRowError`, also for what `submission_text` refuses.
    """
    return parse_object(submission_text(line).encode())


def require_keys(row: JSONMapping, *keys: str) -> None:
    """Raise `BadRowError` unless a row of a leaderboard's file has exactly these keys."""
    if set(row) != set(keys):
        found = escaped(", ".join(row))
        raise BadRowError(f"has the keys {found} instead of {', '.join(keys)}")


def decode(content: bytes) -> str:
    """Decode UTF-8; raises `BadRowError` that names the first wrong byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(f"is not UTF-8 at byte {error.start + 1}") from None


def parse_object(content: bytes) -> JSONObject:
    """Parse one JSON object; raises `BadRowError` when the line is not one or has a key twice."""
    try:
        row = json.loads(decode(content), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise BadRowError("is not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise BadRowError(f"is not JSON ({escaped(str(error))})") from None
    if not isinstance(row, dict):
        raise BadRowError("is not a JSON object")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> JSONObject:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise BadRowError(f"has a key twice in {quoted([key for key, _ in pairs])}")
    return row


def require_field(row: JSONMapping, key: str, expected: type[Value]) -> Value:
    """Return `row[key]`; raises `BadRowError` when it is missing or of another type."""
    if key not in row:
        raise BadRowError(f"has no {key!r}")
    value = row[key]
    # Python counts bool as int; these files do not.
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise BadRowError(f"{key!r} is {quoted(value)}, expected {_TYPE_NAMES[expected]}")
    # A lone surrogate ("\\ud800" in JSON) is no character: no tokenizer takes it.
    if isinstance(value, str) and _SURROGATE.search(value):
        raise BadRowError(f"{key!r} contains half of a surrogate pair, which is not a character")
    return value


_TYPE_NAMES: dict[type, str] = {str: "text", int: "an integer", dict: "an object", list: "a list"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_index(text: str) -> int:
    """Return a row's index; raises `BadRowError` unless it is ASCII digits, as in 0, 7 or 120."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,17}", text):
        raise BadRowError(f"index {quoted(text)} is not a non-negative integer")
    return int(text)


def require_index(row: JSONMapping, key: str = "idx") -> int:
    """Return the index `row[key]`; raises `BadRowError` unless it is an integer from 0 on."""
    index = require_field(row, key, int)
    if index < 0:
        raise BadRowError(f"{key!r} is {index}, expected a non-negative integer")
    return index


def collect(
    rows: Iterable[Row],
    cast: Callable[[Row], list[Item]],
    skip_bad_rows: Optional[bool],
    cure: str = "fix the row",
) -> tuple[list[Item], list[str]]:
    """Cast each row to its items.

    Returns the items and one message per skipped row. Without `skip_bad_rows` the first broken
    row raises a `UserError` that names file, line, what is wrong, and the cure: that flag too, but
    for None, which stands for a program without it.
    """
    cure = cure if skip_bad_rows is None else f"{cure} or give --skip_bad_rows"
    items: list[Item] = []
    skipped: list[str] = []
    for row in rows:
        try:
            items += cast(row)
        except BadRowError as problem:
            message = f"{row.where}: {problem}"
            if not skip_bad_rows:
                raise UserError(f"{message}; {cure}") from None
            skipped.append(message)
    return items, skipped
