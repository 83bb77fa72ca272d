"""Formats of text files: plain text and JSON lines, compressed or not, and parquet.

A file's format is told by its name, else by its first bytes. Files are read in pieces.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import zlib
from functools import partial
from typing import IO, Any, Callable, Iterable, Iterator, NamedTuple, Optional

from bort.errors import UserError, escaped, quoted
from bort.files import is_lfs_pointer, open_regular
from bort.types import JSONObject
from data.remote import is_remote, open_remote, remote_errors, remote_size

READ_BYTES = 1 << 20
# A row of JSON lines is parsed as a whole.
MAX_ROW_BYTES = 64 << 20
TEXT_FIELD = "text"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Bytes of text that a .zst file may refer back to, which memory then holds: as many as the program
# zstd takes, for large dumps that were made with --long=31. The package takes 128 MiB by default.
_ZSTD_WINDOW = 1 << 31
_ROWS_AT_ONCE = 64
_OPEN: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    # Not of any format: zeros are empty archives of the older one.
    ".xz": partial(lzma.open, format=lzma.FORMAT_XZ),
}
_COMPRESSED_SUFFIXES = (*_OPEN, ".zst")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_OBJECT_BEGINS = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*["\[{\w-]')
# JSON that is a list or has an object over several lines: JSON lines with a mistake, not text.
_JSON_BEGINS = re.compile(rb'\[\s*\{\s*"|\{\s*\n\s*"')
# The first bytes of compressed data, for names that do not say it.
_COMPRESSED = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
# The first bytes of other binary files, to say what they are.
_BINARY = {
    b"%PDF-": "a PDF file",
    b"PK\x03\x04": "a zip archive (as .docx, .odt and .xlsx are)",
    b"\xd0\xcf\x11\xe0": "a Microsoft Office file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x1f\x9d": "compressed with compress (.Z)",
    b"\x5d\x00\x00": "compressed with lzma (.lzma)",
    b"ARROW1": "an Arrow file",
    b"PAR1": "parquet in another compression",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x7fELF": "a program",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
}
# What text of other formats begins with; it would be trained on with its marks.
_MARKED = {
    re.compile(rb"<!doctype html|<html\b", re.IGNORECASE): "HTML",
    re.compile(rb"<\?xml\b"): "XML",
    re.compile(rb"<doc id="): "marked by WikiExtractor, whose --json writes JSON lines",
    re.compile(rb"WARC/\d"): "a web archive",
    re.compile(rb"\{\\rtf"): "an RTF document",
}
_TABLE_SUFFIXES = (".csv", ".tsv")
_ACCEPTED = (
    "give UTF-8 text or JSON lines (.jsonl, .ndjson, .json), plain or compressed with gzip, bzip2, "
    "xz or zstd, or parquet (.parquet)"
)
_DAMAGED = "{path}: damaged, or not a {suffix} file ({error}); get it again"


class TextSource(NamedTuple):
    """One file to read.

    path: the file.
    text_field: the field of JSON lines, or the column of parquet, that holds the text.
    name: what messages and the manifest call the file, where that is not its path.
    """

    path: str
    text_field: str = TEXT_FIELD
    name: str = ""

    @property
    def shown(self) -> str:
        """Return the name for messages."""
        return self.name or self.path


def suffixes(path: str) -> str:
    """Return what a file's name says of its format, such as ".jsonl.gz", in lower case."""
    name, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(name)[1] if suffix in _COMPRESSED_SUFFIXES else ""
    return inner + suffix


def size_of(source: TextSource) -> int:
    """Return the bytes of a file, compressed if it is; raises `UserError` when it is missing."""
    if is_remote(source.path):
        return remote_size(source.path)
    try:
        return os.path.getsize(source.path)
    except OSError as error:
        raise UserError(f"{source.shown}: cannot be read ({error.strerror})") from None


# ---- plain text, compressed or not ---------------------------------------------------------------


def read_pieces(path: str, name: Optional[str] = None, start: int = 0) -> Iterator[bytes]:
    """Yield a file's content in pieces of about a megabyte, decompressed (gzip, bzip2, xz, zstd).

    It begins with byte `start` of the content; what is compressed is read from its beginning.

    Raises `UserError` when the file, called `name`, cannot be read or is damaged.
    """
    name, suffix = name or path, _compression_of(path)
    try:
        with remote_errors(path, name), _open(path) as raw:
            yield from _content_of(raw, suffix, start)
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        raise UserError(_DAMAGED.format(path=name, suffix=suffix, error=error)) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(_DAMAGED.format(path=name, suffix=suffix, error=error)) from None


def _content_of(raw: IO[bytes], suffix: str, start: int) -> Iterator[bytes]:
    if not suffix:
        raw.seek(start)
        yield from _pieces_of(raw, READ_BYTES)
    elif suffix == ".zst":
        yield from _without_first(_decompress_zstd(raw), start)
    else:
        yield from _without_first(_pieces_of(_OPEN[suffix](raw), READ_BYTES), start)


def _open(path: str) -> IO[bytes]:
    return open_remote(path) if is_remote(path) else open_regular(path)


def _compression_of(path: str) -> str:
    """Return the suffix of a file's compression, by its name or its first bytes; "" for none."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in _COMPRESSED_SUFFIXES else _compression_in(_first_bytes(path))


def _compression_in(content: bytes) -> str:
    return next((suffix for suffix, magic in _COMPRESSED.items() if magic.match(content)), "")


def _first_bytes(path: str) -> bytes:
    try:
        with remote_errors(path), _open(path) as file:
            return file.read(16)
    except OSError:
        return b""  # the next read reports the error


def _pieces_of(file: Any, size: int) -> Iterator[bytes]:
    while piece := file.read(size):
        yield piece


def _without_first(pieces: Iterable[bytes], count: int) -> Iterator[bytes]:
    """Yield pieces without their first `count` bytes."""
    for piece in pieces:
        if len(piece) > count:
            yield piece[count:]
        count = max(0, count - len(piece))


def _decompress_zstd(file: Any) -> Iterator[bytes]:
    """Yield the content of the frames of a .zst file.

    Not by zstandard's own reader: it takes the end of a truncated file for the end of the text.
    """
    import zstandard

    frame, ready = None, bytearray()
    # A few bytes at a time, because each may expand to ten thousand.
    for piece in _pieces_of(file, 512):
        rest = piece
        while rest:
            frame = (
                frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            )
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
        raise EOFError("it is truncated")
    if ready:
        yield bytes(ready)


def text_pieces(source: TextSource, start: int = 0) -> Iterator[bytes]:
    """Yield a file's text from byte `start` in pieces.

    Raises `UserError` for a binary file, markup or a table, which it names, and for lines that end
    with CR alone: all of them would be one sentence.
    """
    _refuse_lfs_pointer(source)
    for number, piece in enumerate(read_pieces(source.path, source.shown, start)):
        kind = number == start == 0 and (_kind_of_binary(piece) or _kind_of_marked(source, piece))
        if kind:
            raise UserError(f"{source.shown}: is {kind}, not text; {_ACCEPTED}")
        if number == start == 0 and b"\r" in piece.rstrip() and b"\n" not in piece:
            raise UserError(
                f"{source.shown}: its lines end with CR alone, as on old Macs; convert the file, "
                "e.g. with tr '\\r' '\\n'"
            )
        yield piece


def _refuse_lfs_pointer(source: TextSource) -> None:
    if is_lfs_pointer(source.path):
        raise UserError(
            f"{source.shown}: is a Git LFS pointer, not the text; fetch it with git lfs pull"
        )


def _kind_of_binary(piece: bytes) -> Optional[str]:
    for magic, kind in _BINARY.items():
        if piece.startswith(magic):
            return kind
    if piece[257:262] == b"ustar":
        return "a tar archive"
    if _compression_in(piece):
        return "compressed twice"
    return "binary" if b"\0" in piece else None


def _kind_of_marked(source: TextSource, piece: bytes) -> Optional[str]:
    begins = piece.removeprefix(BYTE_ORDER_MARK).lstrip()
    for mark, kind in _MARKED.items():
        if mark.match(begins):
            return kind
    return "a table" if suffixes(source.path).startswith(_TABLE_SUFFIXES) else None


# ---- JSON lines ----------------------------------------------------------------------------------


def is_json_lines(source: TextSource, first_piece: bytes) -> bool:
    """Tell JSON lines by their name or their first rows.

    Those are an object with the text field, or two objects; of a row longer than a piece, the
    beginning of an object. A list of objects, and one over several lines, are JSON lines that their
    reader refuses.
    """
    name = suffixes(source.path)
    if any(name.startswith(suffix) for suffix in _JSON_SUFFIXES):
        return True
    content = first_piece.removeprefix(BYTE_ORDER_MARK).lstrip()
    if _JSON_BEGINS.match(content):
        return True
    lines = content.split(b"\n")
    if len(lines) == 1 and len(first_piece) >= READ_BYTES:
        return bool(_OBJECT_BEGINS.match(lines[0]))
    row, following, *_ = *filter(bytes.strip, lines), b"", b""
    first = _object_of(row)
    if isinstance(first.get(source.text_field, 0), (str, type(None))):
        return True
    return bool(first) and bool(_object_of(following))


def _object_of(line: bytes) -> JSONObject:
    """Return the JSON object on a line; an empty one where there is none."""
    if not line.lstrip().startswith(b"{"):
        return {}
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}


def json_texts(
    pieces: Iterable[bytes], source: TextSource, start: int = 0
) -> Iterator[tuple[int, str]]:
    """Yield the text of each row of JSON lines, after the offset of the row; null is skipped.

    `start` is the offset of the first piece.

    Raises `UserError` that names the line of a row that is not JSON or has no text.
    """
    at, after = start, f" after byte {start}" if start else ""
    for number, line in enumerate(_lines(pieces, source), start=1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 and not start else line
        if content.strip():
            where = f"{source.shown}, line {number}{after}"
            yield at, _text_of_row(content, source.text_field, where)
        at += len(line) + 1


def _lines(pieces: Iterable[bytes], source: TextSource) -> Iterator[bytes]:
    rest: list[bytes] = []  # of a line that pieces cut
    size = number = 0
    for piece in pieces:
        *lines, last = piece.split(b"\n")
        for line in lines:
            number += 1
            yield b"".join([*rest, line])
            rest, size = [], 0
        rest.append(last)
        size += len(last)
        if size > MAX_ROW_BYTES:
            raise UserError(
                f"{source.shown}, line {number + 1}: longer than {MAX_ROW_BYTES >> 20} MiB; "
                "JSON lines hold one object per line"
            )
    yield b"".join(rest)


def _text_of_row(line: bytes, text_field: str, where: str) -> str:
    try:
        row = json.loads(line.decode())
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: the byte 0x{line[error.start]:02x} at offset {error.start} of the line is "
            "not UTF-8"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{where}: is not JSON ({escaped(str(error))}); JSON lines hold one object per line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is {quoted(row, 40)}, expected an object with {text_field!r}")
    if text_field not in row:
        raise UserError(f"{where}: has no field {text_field!r}; {_other_fields(row)}")
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_field!r} is {quoted(text, 40)}, expected a string")
    return text


def _other_fields(names: Iterable[str]) -> str:
    return f"name the one that holds the text by --text_field: {escaped(', '.join(names))}"


# ---- parquet -------------------------------------------------------------------------------------


def is_parquet(path: str) -> bool:
    """Tell a parquet file by its name or its first bytes."""
    return path.lower().endswith(_PARQUET_SUFFIXES) or _first_bytes(path)[:4] == b"PAR1"


def parquet_texts(source: TextSource, start: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each row of a parquet file from row `start` on.

    Null is an empty text.

    Raises `UserError` without pyarrow, for a file that is damaged or lacks the column, and when a
    server fails.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{source.shown}: to read parquet, install the package pyarrow: pip install "
            "pyarrow==19.0.1"
        ) from None
    _refuse_lfs_pointer(source)
    with remote_errors(source.path, source.shown):
        yield from _rows_of(pa, pq, source, start)


def _rows_of(pa: Any, pq: Any, source: TextSource, start: int) -> Iterator[tuple[int, str]]:
    try:
        if not is_remote(source.path):
            open_regular(source.path).close()
        raw = open_remote(source.path) if is_remote(source.path) else source.path
        with pq.ParquetFile(raw, page_checksum_verification=True) as file:
            _require_text_column(file.schema_arrow, source)
            row, groups = _row_groups_from(file.metadata, start)
            for batch in file.iter_batches(_ROWS_AT_ONCE, groups, [source.text_field]):
                # By its name: a dot in it reads a field of a structure, too.
                for text in batch.column(source.text_field).to_pylist():
                    if row >= start:
                        yield row, text or ""
                    row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = escaped(str(error).split("\n", 1)[0])
        raise UserError(
            f"{source.shown}: damaged, or not a parquet file ({reason}); get it again"
        ) from None


def _row_groups_from(metadata: Any, start: int) -> tuple[int, list[int]]:
    """Return the first row of the row group that holds row `start`, and the groups from it on."""
    row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row + rows > start:
            return row, list(range(group, metadata.num_row_groups))
        row += rows
    return row, []


def _require_text_column(schema: Any, source: TextSource) -> None:
    if source.text_field not in schema.names:
        raise UserError(
            f"{source.shown}: has no column {source.text_field!r}; {_other_fields(schema.names)}"
        )
    if schema.names.count(source.text_field) > 1:
        raise UserError(
            f"{source.shown}: has several columns {source.text_field!r}; rename all but one"
        )
    column = schema.field(source.text_field).type
    if not re.match(r"(dictionary<values=)?(large_)?string\b", str(column)):
        raise UserError(
            f"{source.shown}: column {source.text_field!r} holds {column}, expected strings"
        )
