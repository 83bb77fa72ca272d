"""Protocol buffers, read and written field by field: of a file of 300 MB what is needed alone.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
from typing import Iterator, NamedTuple, Union

Buffer = Union[bytes, mmap.mmap]  # a message, or a file that is mapped into memory

_VARINT, _EIGHT_BYTES, _MESSAGE, _FOUR_BYTES = 0, 1, 2, 5  # how a field is encoded


class Field(NamedTuple):
    """A field in a buffer: its number, where it begins, and where its value begins and ends."""

    number: int
    begin: int
    start: int
    end: int


def fields(content: Buffer, place: int = 0, end: int | None = None) -> Iterator[Field]:
    """Yield the fields of the message between two places of a buffer.

    Raises `ValueError` or `IndexError` where there is none.
    """
    end = len(content) if end is None else end
    while place < end:
        begin = place
        tag, start = _varint(content, place)
        kind = tag & 7
        if kind == _MESSAGE:
            length, start = _varint(content, start)
            place = start + length
        elif kind == _VARINT:
            place = _varint(content, start)[1]
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place = start + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError("an unknown kind of field")
        if place > end:
            raise ValueError("it is truncated")
        yield Field(tag >> 3, begin, start, place)


def _varint(content: Buffer, place: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 64 bits")


def number_at(content: Buffer, place: int) -> int:
    """Return the number at a place."""
    return _varint(content, place)[0]


def message(number: int, *parts: bytes) -> bytes:
    """Return a field that holds a message, or a text."""
    size = sum(map(len, parts))
    return b"".join((varint(number << 3 | _MESSAGE), varint(size), *parts))


def integer(number: int, value: int) -> bytes:
    """Return a field that holds a number, not negative."""
    return varint(number << 3 | _VARINT) + varint(value)


def varint(value: int) -> bytes:
    """Return a number, not negative, in the encoding with 7 bits a byte."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
