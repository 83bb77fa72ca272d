"""Text files to documents: one sentence per line, a blank line between documents.

Everything is read in pieces, so that memory grows neither with a file nor with a document.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import itertools
import lzma
import os
import re
import zlib
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

from bort.errors import UserError

READ_BYTES = 1 << 20
# A longer document counts as several: it is cut after the last line (else word) that fits.
MAX_DOCUMENT_BYTES = 4 << 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"\n[ \t\r\f\v]*\n\s*")
_OPEN: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGED = "{path}: damaged, or not a {suffix} file ({error}); get it again"


@dataclass(frozen=True)
class TextFile:
    """One input file: its path, and the SHA-256, the bytes and the documents of its text.

    The hash is that of the text itself, before compression. `bytes` counts the documents alone,
    without the blank lines between them.
    """

    path: str
    sha256: str
    bytes: int
    documents: int


def find_inputs(patterns: str) -> list[str]:
    """Return the files that a comma-separated list of paths and globs names, each once.

    The order is that of the list, sorted within a glob. Raises `UserError` for a part of the list
    that matches no file.
    """
    paths: dict[str, None] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        files = [path for path in matches if os.path.isfile(path)]
        if not files:
            cure = f"; give {pattern}/* for what is in it" if matches == [pattern] else ""
            raise UserError(f"--input_file {pattern}: no such file{cure}")
        paths.update(dict.fromkeys(files))
    if not paths:
        raise UserError(f"--input_file {patterns!r}: names no file")
    return list(paths)


def survey(path: str, advance: Callable[[int], None] = lambda size: None) -> TextFile:
    """Read a file once to know and check it; `advance` is told of the bytes of each piece.

    Raises `UserError` when the file cannot be read, is damaged, is not UTF-8 (with line and byte)
    or holds no text.
    """
    digest, size, documents = hashlib.sha256(), 0, 0

    def observed() -> Iterator[bytes]:
        for piece in read_pieces(path):
            digest.update(piece)
            advance(len(piece))
            yield piece

    for document in split_documents(observed()):
        try:
            document.decode()
        except UnicodeDecodeError:
            raise UserError(_first_bad_byte(path)) from None
        size += len(document)
        documents += 1
    if not documents:
        raise UserError(f"{path}: holds no text; take it out of --input_file")
    return TextFile(path, digest.hexdigest(), size, documents)


def read_documents(path: str) -> Iterator[bytes]:
    """Yield the documents of a file as UTF-8: lines of text, with no blank line between them."""
    return split_documents(read_pieces(path))


def read_pieces(path: str) -> Iterator[bytes]:
    """Yield the text of a plain, .gz, .bz2, .xz or .zst file in pieces of about a megabyte.

    Raises `UserError` when the file cannot be read or its compressed data is damaged.
    """
    suffix = os.path.splitext(path)[1]
    try:
        with _OPEN.get(suffix, _open_plain)(path) as file:
            yield from _unzstd(file) if suffix == ".zst" else _pieces_of(file, READ_BYTES)
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(_DAMAGED.format(path=path, suffix=suffix, error=error)) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(_DAMAGED.format(path=path, suffix=suffix, error=error)) from None


def _open_plain(path: str) -> Any:
    return open(path, "rb")


def _pieces_of(file: Any, size: int) -> Iterator[bytes]:
    while piece := file.read(size):
        yield piece


def _unzstd(file: Any) -> Iterator[bytes]:
    """Yield what the frames of a .zst file hold.

    Not by zstandard's own reader: it takes the end of a truncated file for the end of the text.
    """
    import zstandard

    frame, ready = None, bytearray()
    # Little at a time, because each byte may unfold to ten thousand.
    for piece in _pieces_of(file, 512):
        rest = piece
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                ready += frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise EOFError(error) from None
            rest = frame.unused_data
            frame = None if frame.eof else frame
        if len(ready) >= READ_BYTES:
            yield bytes(ready)
            ready.clear()
    if frame:
        raise EOFError("it ends in the middle")
    if ready:
        yield bytes(ready)


def split_documents(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the documents of a text that comes in pieces; where those end changes nothing."""
    pieces, rest = iter(pieces), b""
    while len(rest) < len(_BYTE_ORDER_MARK) and (piece := next(pieces, b"")):
        rest += piece
    rest = rest.removeprefix(_BYTE_ORDER_MARK)
    for piece in itertools.chain([b""], pieces):
        *whole, rest = _BLANK_LINES.split((rest + piece).lstrip())
        *cut, rest = _cut(rest)
        for document in itertools.chain(*map(_cut, whole), cut):
            if document.strip():
                yield document
    if rest.strip():
        yield rest


def _cut(document: bytes) -> Iterator[bytes]:
    """Yield the document, in parts when it is longer than `MAX_DOCUMENT_BYTES`."""
    while len(document) > MAX_DOCUMENT_BYTES:
        end = _end_of_part(document)
        yield document[:end]
        document = document[end:].lstrip()
    yield document


def _end_of_part(document: bytes) -> int:
    for gap in (b"\n", b" "):
        end = document.rfind(gap, 0, MAX_DOCUMENT_BYTES + 1)
        if end > 0:
            return end
    end = MAX_DOCUMENT_BYTES
    while end > MAX_DOCUMENT_BYTES - 3 and document[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def _first_bad_byte(path: str) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    for piece in itertools.chain(read_pieces(path), [b""]):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = offset - pending + error.start
            return (
                f"{path}, line {line}: the byte 0x{error.object[error.start]:02x} at offset {byte} "
                "is not UTF-8; convert the file, e.g. with iconv -f latin1 -t utf-8"
            )
        offset += len(piece)
        line += piece.count(b"\n")
    raise AssertionError(f"{path} changed while it was read")
