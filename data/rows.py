"""Rows of the official files: UTF-8, one line each, every broken one named or counted.

Lines end at LF only: text files of the tasks contain other characters (U+2028, U+0085) that
`str.splitlines` would take for line ends, and CRLF.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Protocol, TypeVar

from bort.errors import UserError


class Placed(Protocol):
    """A row that knows where it stands, as "file:line"."""

    @property
    def where(self) -> str:
        """The place for messages."""


Item = TypeVar("Item")
Row = TypeVar("Row", bound=Placed)


class BadRowError(Exception):
    """Says what is wrong with one row; `collect` adds the file and the line."""


class Line(NamedTuple):
    """One line of a file: `where` is "file:line" for messages, `number` counts from 1."""

    where: str
    number: int
    content: bytes


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file without their ends, a byte order mark and blank lines at its end.

    Raises `UserError` when the file cannot be opened.
    """
    blank: list[Line] = []
    try:
        with open(path, "rb") as handle:
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
    """Return a line without its end, the first one of a file without a byte order mark."""
    marked = first and raw.startswith(codecs.BOM_UTF8)
    return raw[len(codecs.BOM_UTF8) if marked else 0 :].rstrip(b"\r\n")


def decode(content: bytes) -> str:
    """Decode UTF-8; raises `BadRowError` that names the first wrong byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(f"is not UTF-8 at byte {error.start + 1}") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse one JSON object; raises `BadRowError` when it is none."""
    try:
        row = json.loads(decode(content))
    except ValueError as error:
        raise BadRowError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRowError("is not a JSON object")
    return row


def member(row: Mapping[str, Any], key: str, kind: type[Item]) -> Item:
    """Return `row[key]`; raises `BadRowError` when it is missing or not of the given type."""
    if key not in row:
        raise BadRowError(f"has no {key!r}")
    value = row[key]
    # bool is a kind of int for Python, never for these files.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRowError(f"{key!r} is {value!r}, where {_KINDS[kind]} belongs")
    return value


_KINDS: dict[type, str] = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


def collect(
    rows: Iterable[Row],
    cast: Callable[[Row], list[Item]],
    skip_bad_rows: bool,
    cure: str = "mend the row or give --skip_bad_rows",
) -> tuple[list[Item], list[str]]:
    """Cast each row to its items.

    Returns the items and one message per row skipped. Without `skip_bad_rows` the first broken
    row raises a `UserError` that names file, line, what is wrong, and the cure.
    """
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
