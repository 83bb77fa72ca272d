"""ONNX files: their SHA-256, their metadata, and how they are loaded and written.

A file ends with 76 bytes that hold the SHA-256 of everything before them. To ONNX they are one
more entry of the model's metadata: a protocol buffer that is appended to another is merged with it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Callable, Mapping, TypeVar

from bort.errors import UserError, reasons
from bort.files import (
    MODEL_BYTES,
    atomic_write,
    decode_json,
    open_regular,
    remove_left_overs_of,
)
from bort.inference.onnx_constants import Separated, align_constants, separate
from bort.inference.protobuf import Buffer, Field, fields
from bort.shapes import MAX_LENGTH

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

OUTPUT = "scores"  # the output of a classifier; part of the file format
# Written into the metadata of files that end with a SHA-256; older files have neither.
FORMAT = "2"
# ModelProto.metadata_props (field 14), 74 bytes: key (field 1) "sha256", value (field 2) 64 digits.
_TRAILER_START = b"\x72\x4a\x0a\x06sha256\x12\x40"
_TRAILER_BYTES = len(_TRAILER_START) + 64
METADATA_FIELD = 14  # metadata_props of ModelProto
# The folder of external data, for a graph that is not read from a file
# (onnxruntime_session_options_config_keys.h).
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_WINDOW = 1 << 26  # bytes of a file that are hashed at once

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class OnnxMetadata:
    """What a file says about its model.

    has_digest: the file ends with its SHA-256.
    parameters_sha256: of the .params file it was made from; empty if unknown.
    """

    precision: str
    positions: int
    vocab_size: int
    has_digest: bool
    parameters_sha256: str


@dataclass(frozen=True)
class _VocabularySize:
    vocab_size: int


def parse_metadata(name: str, metadata: Mapping[str, str]) -> OnnxMetadata:
    """Read the metadata of a graph; raises `UserError` when it is not a graph of ours."""
    size = metadata.get("vocab_size", "")
    config = metadata.get("model config") or metadata.get("card")
    if not size and config:  # of an earlier version: only in the model config
        stored = decode_json(config.encode(), _VocabularySize, f"{name}: its model config")
        size = str(stored.vocab_size)
    try:
        positions, vocab_size = int(metadata["positions"]), int(size)
        precision = metadata["precision"]
    except (KeyError, ValueError):
        raise UserError(f"{name}: was not written by scripts/export_onnx.py") from None
    if not 1 <= positions <= MAX_LENGTH or vocab_size < 1:
        raise UserError(f"{name}: is damaged: {positions} positions, {vocab_size} tokens")
    return OnnxMetadata(
        precision,
        positions,
        vocab_size,
        metadata.get("format") == FORMAT,
        metadata.get("parameters_sha256", ""),
    )


def read_metadata(name: str, model: bytes | str) -> dict[str, str]:
    """Return the metadata of a file or its content, without parsing its graph.

    Raises `UserError` when it is no onnx.ModelProto.
    """
    if not isinstance(model, str):
        return _parsed(name, lambda: _metadata(model))
    with _mapped(model) as content:
        return _parsed(name, lambda: _metadata(content))


def read_separated(path: str) -> Separated | None:
    """Read a file without its large constants; None where most of them are not aligned.

    Files of earlier versions are not: their content would fill the memory twice.

    Raises `UserError` when it is no onnx.ModelProto.
    """
    with _mapped(path) as content:
        found = _parsed(path, lambda: separate(content))
        inside = sum(len(part) for part in (found.head, found.graph))
        return found if inside < len(content) / 2 else None


def _mapped(path: str) -> mmap.mmap:
    """Map a file into memory; an empty one cannot be, and is no ONNX file."""
    try:
        with open_regular(path, MODEL_BYTES) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: is not an ONNX file: it is empty") from None


def _parsed(name: str, parse: Callable[[], Parsed]) -> Parsed:
    try:
        return parse()
    except (IndexError, ValueError, KeyError):
        raise UserError(f"{name}: is not an ONNX file, or damaged; write it again") from None


def _metadata(content: Buffer) -> dict[str, str]:
    entries = (field for field in fields(content) if field.number == METADATA_FIELD)
    return dict(_pair(content, entry) for entry in entries)


def _pair(content: Buffer, entry: Field) -> tuple[str, str]:
    """Return the key and the value of a StringStringEntryProto."""
    parts = {1: "", 2: ""}
    for field in fields(content, entry.start, entry.end):
        if field.number not in parts:
            raise KeyError(field.number)
        parts[field.number] = content[field.start : field.end].decode()
    return parts[1], parts[2]


def onnx_session(model: bytes | str, threads: int) -> InferenceSession:
    """Load a file, or its content, into ONNX Runtime; raises `UserError` when it cannot be.

    The file is mapped into memory: it may be replaced later, but not be overwritten.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # no warnings
    name, content = "the ONNX graph", model
    if isinstance(model, str):
        # Links are followed here: the runtime refuses constants that lie outside of its folder.
        name, path = model, os.path.realpath(model)
        content = path
        if not _is_utf8(path):
            raise UserError(f"{model}: its path is not UTF-8, which ONNX Runtime needs; rename it")
        if maps_constants(onnxruntime.__version__) and (separated := read_separated(path)):
            content = separated.with_external_data(os.path.basename(path))
            options.add_session_config_entry(_EXTERNAL_FOLDER, os.path.dirname(path))
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no class
        reason = reasons(error)[-1]
        raise UserError(f"{name}: ONNX Runtime cannot load it ({reason})") from None


def maps_constants(version: str) -> bool:
    """Return whether this ONNX Runtime takes a graph's constants from a folder: from 1.21."""
    return tuple(map(int, version.split(".")[:2])) >= (1, 21)


def _is_utf8(path: str) -> bool:
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False


def verify_onnx_file(path: str) -> bool:
    """Return whether a file ends with its SHA-256; raises `UserError` when that is wrong."""
    try:
        with open_regular(path, MODEL_BYTES) as file:
            size = file.seek(0, os.SEEK_END) - _TRAILER_BYTES
            if size <= 0:
                return False
            file.seek(size)
            trailer = file.read()
            if not trailer.startswith(_TRAILER_START):
                return False
            digest = _sha256(file, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if trailer[len(_TRAILER_START) :] != digest.encode():
        raise UserError(f"{path}: does not match its SHA-256: the file is damaged; write it again")
    return True


def _sha256(file: IO[bytes], size: int) -> str:
    """Return the SHA-256 of the first bytes of a file.

    Few large pieces, because after each it waits for its turn among the threads of Python; mapped,
    because to read into a buffer takes longer.
    """
    digest = hashlib.sha256()
    for start in range(0, size, _WINDOW):
        length = min(_WINDOW, size - start)
        with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as window:
            digest.update(window)
    return digest.hexdigest()


def write_onnx(model: onnx.ModelProto, path: str) -> None:
    """Check an onnx.ModelProto as the onnx package does and write it, with its SHA-256.

    Descriptions are added to the model, so that its constants are aligned in the file.

    Raises `UserError` when the file cannot be written.
    """
    import onnx

    align_constants(model)
    content = model.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    remove_left_overs_of(path)
    with atomic_write(path, "wb") as file:
        file.write(content)
        file.write(_TRAILER_START + hashlib.sha256(content).hexdigest().encode())
