"""Append-only records on disk: JSON lines that survive a kill, and damage to single lines."""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from typing import Any, Callable, Iterator

from bort.errors import UserError, escaped, quoted
from bort.files import atomic_write, lines_of
from bort.types import JSONMapping

DAMAGED = ".damaged"  # the suffix of the file that keeps damaged lines
SUM = "crc32"  # the last key of a line: the CRC-32 of the text before it
_END = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n?\Z')


def line_of(record: JSONMapping) -> bytes:
    """Return a record, which is not empty, as a JSON line that ends with its CRC-32."""
    text = json.dumps(record).encode()[:-1]
    return b'%s, "%s": "%08x"}\n' % (text, SUM.encode(), zlib.crc32(text))


def record_of(line: bytes) -> Any:
    """Return the JSON value on a line, without its CRC-32; lines of earlier versions have none.

    Raises `ValueError` or `RecursionError` when the line is damaged.
    """
    end = _END.search(line)
    if end and zlib.crc32(line[: end.start()]) != int(end[1], 16):
        raise ValueError("its CRC-32 does not match")
    record = json.loads(line.decode("utf-8"))
    if end:
        del record[SUM]
    elif isinstance(record, dict) and SUM in record:
        raise ValueError("its CRC-32 cannot be read")
    return record


class Journal:
    """A file with a JSON record, an object, and its CRC-32 on each line.

    A record is on the disk when `append` returns. Opening the file drops a last line that a kill
    cut short. Any other line that is no record is reported with file and line, and moved to
    `<path>.damaged`: its record is missing from `records`, the others are not lost.

    `is_record` tells whether a JSON value is a record; it may raise KeyError, TypeError, ValueError
    or OverflowError for one that is not.
    """

    def __init__(self, path: str, is_record: Callable[[Any], bool]) -> None:
        self.path = path
        self.records: list[Any] = []
        valid, damaged = [], []
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                record = _decoded(line, is_record)
            except ValueError as error:
                damaged.append(line)
                print(
                    f"warning: {path}:{number}: damaged record, moved to {path}{DAMAGED} ({error})",
                    file=sys.stderr,
                )
            else:
                valid.append(line)
                self.records.append(record)
        if damaged:
            _append(f"{path}{DAMAGED}", damaged)
            with atomic_write(path, "wb") as handle:
                handle.writelines(valid)
        elif os.path.exists(path) and os.path.getsize(path) > sum(map(len, valid)):
            os.truncate(path, sum(map(len, valid)))

    def set_aside(self, reason: str) -> None:
        """Move all records to `<path>.damaged` and say why; the file is empty afterwards."""
        print(
            f"warning: {self.path}: {reason}; its {len(self.records)} records are moved to "
            f"{self.path}{DAMAGED}",
            file=sys.stderr,
        )
        _append(f"{self.path}{DAMAGED}", list(_whole_lines(self.path)))
        self.records = []
        with atomic_write(self.path, "wb"):
            pass

    def append(self, record: JSONMapping) -> None:
        """Write one record; it is on the disk when this returns."""
        _append(self.path, [line_of(record)])
        self.records.append(record)


def read_records(path: str, is_record: Callable[[Any], bool]) -> list[Any]:
    """Return the records of a journal and leave it as it is.

    Raises `UserError` for the first line that is no record; a last line without its end is one
    that a kill cut short, and left out.
    """
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            records.append(_decoded(line, is_record))
        except ValueError as error:
            raise UserError(f"{path}:{number}: damaged record ({error})") from None
    return records


def first_record(path: str) -> Any:
    """Return the first record of a journal, which stays as it is; None where there is none."""
    try:
        return record_of(next(_whole_lines(path), b""))
    except (ValueError, RecursionError):
        return None


def _whole_lines(path: str) -> Iterator[bytes]:
    """Yield the lines that have their end."""
    if os.path.exists(path):
        yield from (line for line in lines_of(path) if line.endswith(b"\n"))


def _decoded(line: bytes, is_record: Callable[[Any], bool]) -> Any:
    """Return the record on a line; raises `ValueError` when there is none."""
    try:
        record = record_of(line)
        valid = is_record(record)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(escaped(f"{type(error).__name__}: {error}")) from None
    if not valid:
        raise ValueError(f"unexpected content {quoted(record)}")
    return record


def _append(path: str, lines: list[bytes]) -> None:
    try:
        with open(path, "ab") as handle:
            handle.writelines(lines)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space and run the same "
            "command again"
        ) from None
