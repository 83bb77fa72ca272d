"""Files of text to documents.

In plain text a document ends at a blank line and has one sentence per line; in JSON lines and
parquet a row is a document. Everything is read in pieces: memory grows neither with a file nor with
a document.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import itertools
import os
import re
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

from bort.errors import UserError
from bort.files import listed_names, walk
from bort.tokenization import utf8_bytes
from data.remote import is_remote, remote_files
from data.text_formats import (
    BYTE_ORDER_MARK,
    READ_BYTES,
    TEXT_FIELD,
    TextSource,
    is_json_lines,
    is_parquet,
    json_texts,
    parquet_texts,
    read_pieces,
    suffixes,
    text_pieces,
)

# A longer document counts as several: it is cut after the last line (else word) that fits.
MAX_DOCUMENT_BYTES = 4 << 20
STANDARD_INPUT = "-"

_BLANK_LINES = re.compile(rb"\n[ \t\r\f\v]*\n\s*")
_VISIBLE_ASCII = re.compile(rb"[!-~]")


# Finished shards hold the old text, and a run with the new one refuses to add to them.
CHANGED = "changed while it was read; start again with an empty --output_dir when it is complete"


@dataclass(frozen=True)
class TextFile:
    """What was found in one file: the SHA-256, the bytes and the documents of its text.

    The hash is that of the decompressed text or JSON lines; of a parquet file, that of its
    documents. `bytes` counts the documents without the blank lines between them, and one line end.
    """

    path: str
    sha256: str
    bytes: int
    documents: int


# ---- which files ---------------------------------------------------------------------------------


def find_inputs(patterns: str, is_output: Callable[[str], bool] = lambda path: False) -> list[str]:
    r"""Return the files that a comma-separated list of paths, globs and folders names, each once.

    A file that is named in several ways, such as `a`, `./a` and by a link, has the first spelling.
    `**` in a glob matches any number of folders; a folder stands for all files in it and below it,
    except hidden ones. Links to folders are followed. `\,` is a comma in a name; `-` is standard
    input. The order is that of the list, sorted within a glob or a folder. Of globs and folders,
    files for which `is_output` holds are left out: what an earlier run has made of the text.

    Raises `UserError` for a part of the list that matches no file.
    """
    paths: dict[str, str] = {}
    for pattern in listed_names(patterns):
        matched = _files_of(pattern) if pattern else []
        found = [path for path in matched if matched == [pattern] or not is_output(path)]
        if pattern and not found:
            reason = "the folder holds no files" if os.path.isdir(pattern) else "no such file"
            if matched:
                reason = "names no text, only the shards of --output_dir"
            is_name = pattern != patterns and os.path.exists(patterns)
            cure = "; write \\, for a comma in a name" if is_name else ""
            raise UserError(f"--input_file {pattern}: {reason}{cure}")
        for path in found:
            paths.setdefault(_one_spelling(path), path)
    if not paths:
        raise UserError(f"--input_file {patterns!r}: names no file")
    for path in paths.values():
        _require_utf8_name(path)
    return list(paths.values())


def _one_spelling(path: str) -> str:
    return path if path == STANDARD_INPUT or is_remote(path) else os.path.realpath(path)


def _files_of(pattern: str) -> list[str]:
    if pattern == STANDARD_INPUT:
        return [pattern]
    if is_remote(pattern):
        return remote_files(pattern)
    if os.path.isdir(pattern):
        return _files_below(pattern)
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    # glob gives "nope/" for "nope/**" even where there is no such folder.
    return [path for path in matches if os.path.lexists(path) and not os.path.isdir(path)]


def _files_below(folder: str) -> list[str]:
    found: list[str] = []
    try:
        for parent, folders, names in walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"--input_file {folder}: {error.filename} cannot be read ({error.strerror}); name the "
            "folders beside it"
        ) from None
    # A link to nothing stays, to be named: its text would be missing.
    return sorted(path for path in found if os.path.isfile(path) or not os.path.exists(path))


def _require_utf8_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--input_file {os.fsencode(path)!r}: the name is not UTF-8; rename the file"
        ) from None


@contextlib.contextmanager
def open_sources(
    patterns: str,
    text_field: str = TEXT_FIELD,
    is_output: Callable[[str], bool] = lambda path: False,
) -> Iterator[list[TextSource]]:
    """Give the files that `find_inputs` finds, as sources that can be read several times.

    Standard input and FIFOs are copied to temporary files, which are removed at the end.

    Raises `UserError` as `find_inputs` does, and when there is no space for a copy.
    """
    with contextlib.ExitStack() as stack:
        sources = []
        for path in find_inputs(patterns, is_output):
            if path == STANDARD_INPUT or not _is_regular(path):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bort-text-"))
                copy = os.path.join(folder, f"text{suffixes(path)}")
                _copy_stream(path, copy)
                sources.append(TextSource(copy, text_field, path))
            else:
                sources.append(TextSource(path, text_field))
        yield sources


def _is_regular(path: str) -> bool:
    if is_remote(path):
        return True
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _copy_stream(path: str, copy: str) -> None:
    try:
        with contextlib.ExitStack() as stack:
            source: Any = sys.stdin.buffer
            if path != STANDARD_INPUT:
                source = stack.enter_context(open(path, "rb"))
            shutil.copyfileobj(source, stack.enter_context(open(copy, "wb")), READ_BYTES)
    except OSError as error:
        raise UserError(
            f"--input_file {path}: cannot be copied to {copy} ({error.strerror}); set TMPDIR to a "
            "folder with more space, or write the text to a file first"
        ) from None


# ---- documents -----------------------------------------------------------------------------------


def scan(
    source: TextSource,
    advance: Callable[[int], None] = lambda size: None,
    locate: Callable[[int, int], None] = lambda start, position: None,
) -> TextFile:
    """Read a file once to check and measure it; `advance` is called with the bytes of each piece.

    `locate` is called for each document, with its start (see `documents_from`) and the bytes of the
    documents before it.

    Raises `UserError` when the file cannot be read, is damaged, is not UTF-8 (with line and byte),
    has a row without text (with its line) or holds no text at all.
    """
    digest, size, documents, has_text = hashlib.sha256(), 0, 0, False

    def observe(piece: bytes) -> None:
        digest.update(piece)
        advance(len(piece))

    for start, document in _documents(source, observe):
        locate(start, size)
        try:
            document.decode()
            has_text = has_text or _has_text(document)
        except UnicodeDecodeError:
            raise UserError(_first_bad_byte(source)) from None
        size += len(document)
        documents += 1
    if not has_text:
        raise UserError(f"{source.shown}: holds no text; leave it out of --input_file")
    return TextFile(source.shown, digest.hexdigest(), size + 1, documents)


def read_documents(source: TextSource) -> Iterator[bytes]:
    """Yield the documents of a file as UTF-8: lines of text without blank lines between them."""
    return (document for _, document in documents_from(source))


def read_scanned(source: TextSource, file: TextFile) -> Iterator[bytes]:
    """Yield the documents of a file that `scan` has read.

    Raises `UserError` at its end when it is another text than it was then.
    """
    digest = hashlib.sha256()
    for _, document in _documents(source, digest.update):
        yield document
    if digest.hexdigest() != file.sha256:
        raise UserError(f"{source.shown}: {CHANGED}")


def documents_from(source: TextSource, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of a file from one of them on, each with its start.

    The start of a document is the offset of its first byte in the decompressed text; of one in JSON
    lines that of its row, of one in parquet the number of its row. A long row holds several.
    """
    return _documents(source, lambda piece: None, start)


def _documents(
    source: TextSource, observe: Callable[[bytes], None], start: int = 0
) -> Iterator[tuple[int, bytes]]:
    if is_parquet(source.path):
        for row, text in parquet_texts(source, start):
            document = _document_of_row(text)
            observe(document + b"\n\n")
            yield from ((row, part) for part in _nonblank_parts(document))
        return
    pieces = _observed(text_pieces(source, start), observe)
    first = next(pieces, b"")
    pieces = itertools.chain([first], pieces)
    if is_json_lines(source, next(text_pieces(source), b"") if start else first):
        for at, text in json_texts(pieces, source, start):
            yield from ((at, part) for part in _nonblank_parts(_document_of_row(text)))
    else:
        yield from located_documents(pieces, start)


def _observed(pieces: Iterable[bytes], observe: Callable[[bytes], None]) -> Iterator[bytes]:
    for piece in pieces:
        observe(piece)
        yield piece


def _has_text(document: bytes) -> bool:
    """Return whether a document has more than white space, that of Unicode included."""
    return bool(_VISIBLE_ASCII.search(document)) or bool(document.decode().strip())


def split_documents(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the documents of a text in pieces; where the pieces end makes no difference."""
    return (document for _, document in located_documents(pieces))


def located_documents(pieces: Iterable[bytes], start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of a text in pieces, each with the offset of its first byte.

    `start` is the offset of the first piece: 0, or that of a document.
    """
    pieces, rest, at = iter(pieces), b"", start  # `at`: the offset of `rest`
    while not start and len(rest) < len(BYTE_ORDER_MARK) and (piece := next(pieces, b"")):
        rest += piece
    if not start and rest.startswith(BYTE_ORDER_MARK):
        rest, at = rest[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
    # The end of the text ends the last document as a blank line would.
    for piece in itertools.chain([b""], pieces, [b"\n\n"]):
        text = (rest + piece).lstrip()
        at += len(rest) + len(piece) - len(text)
        begin = 0
        for gap in _BLANK_LINES.finditer(text):
            yield from _nonblank(_cut(text[begin : gap.start()], at + begin))
            begin = gap.end()
        *parts, (at, rest) = _cut(text[begin:], at + begin)
        yield from _nonblank(parts)


def _nonblank(parts: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    return ((at, part) for at, part in parts if part.strip())


def _document_of_row(text: str) -> bytes:
    """Return a row's text as one document, in the form that `split_documents` gives."""
    parts = _BLANK_LINES.split((utf8_bytes(text) + b"\n\n").lstrip())
    return b"\n".join(part for part in parts if part.strip())


def _nonblank_parts(document: bytes) -> Iterator[bytes]:
    return (part for _, part in _nonblank(_cut(document, 0)))


def _cut(document: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Yield the document, in parts when it is longer than `MAX_DOCUMENT_BYTES`.

    `at` is its offset; each part comes with its own.
    """
    while len(document) > MAX_DOCUMENT_BYTES:
        end = _end_of_part(document)
        yield at, document[:end]
        rest = document[end:].lstrip()
        at += len(document) - len(rest)
        document = rest
    yield at, document


def _end_of_part(document: bytes) -> int:
    for gap in (b"\n", b" "):
        end = document.rfind(gap, 0, MAX_DOCUMENT_BYTES + 1)
        if end > 0:
            return end
    end = MAX_DOCUMENT_BYTES
    while end > MAX_DOCUMENT_BYTES - 3 and document[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    return end


def _first_bad_byte(source: TextSource) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    for piece in itertools.chain(read_pieces(source.path), [b""]):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = offset - pending + error.start
            bad = error.object[error.start]
            return (
                f"{source.shown}, line {line}: the byte 0x{bad:02x} at offset {byte} is not UTF-8; "
                "convert the file, e.g. with iconv -f latin1 -t utf-8"
            )
        offset += len(piece)
        line += piece.count(b"\n")
    return f"{source.shown}: changed while it was read; run the same command again"
