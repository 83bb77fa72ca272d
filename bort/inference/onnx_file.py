"""ONNX files: their SHA-256, their metadata, and how they are loaded and written.

A file ends with 76 bytes that hold the SHA-256 of everything before them. To ONNX they are one
more entry of the model's metadata: a protocol buffer that is appended to another is merged with it.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from typing import Any, Mapping

from bort.errors import UserError, quoted
from bort.files import atomic_write, decode_json, open_regular, remove_left_overs_of
from bort.shapes import MAX_LENGTH

OUTPUT = "scores"  # the output of a classifier; part of the file format
# Written into the metadata of files that end with a SHA-256; older files have neither.
FORMAT = "2"
# ModelProto.metadata_props (field 14), 74 bytes: key (field 1) "sha256", value (field 2) 64 digits.
_TRAILER_START = b"\x72\x4a\x0a\x06sha256\x12\x40"
_TRAILER_BYTES = len(_TRAILER_START) + 64
METADATA_FIELD = 14  # metadata_props of ModelProto


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
    size = metadata.get("vocab_size")
    if size is None:  # written before 0.2: only in the model config
        config = (metadata.get("model config") or metadata.get("card") or "{}").encode()
        size = str(decode_json(config, _VocabularySize, f"{name}: its model config").vocab_size)
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
    try:
        if not isinstance(model, str):
            return _metadata(model)
        with open_regular(model) as file, _mapped(file) as content:
            return _metadata(content)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (IndexError, ValueError, KeyError):
        raise UserError(f"{name}: is not an ONNX file, or damaged; write it again") from None


def _mapped(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _metadata(content: Any) -> dict[str, str]:
    found, place = {}, 0
    while place < len(content):
        field, start, place = _field(content, place)
        if field == METADATA_FIELD:
            key, text = _pair(content[start:place])
            found[key] = text
    return found


def _pair(content: bytes) -> tuple[str, str]:
    place, parts = 0, {1: "", 2: ""}  # of StringStringEntryProto
    while place < len(content):
        field, start, place = _field(content, place)
        if field not in parts:
            raise KeyError(field)
        parts[field] = content[start:place].decode()
    return parts[1], parts[2]


def _field(content: Any, place: int) -> tuple[int, int, int]:
    """Return the number of the field of a protocol buffer at a place, its value's start and end.

    Raises `ValueError` or `IndexError` where there is none.
    """
    tag, place = _varint(content, place)
    kind = tag & 7
    if kind == 0:
        end = _varint(content, place)[1]
    elif kind == 2:
        length, place = _varint(content, place)
        end = place + length
    elif kind in (1, 5):
        end = place + (8 if kind == 1 else 4)
    else:
        raise ValueError("an unknown kind of field")
    if end > len(content):
        raise ValueError("it ends too soon")
    return tag >> 3, place, end


def _varint(content: Any, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 64 bits")


def onnx_session(model: bytes | str, threads: int) -> Any:
    """Load a file, or its content, into ONNX Runtime; raises `UserError` when it cannot be."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # no warnings
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no class
        name = model if isinstance(model, str) else "the ONNX graph"
        reason = quoted(str(error).strip().splitlines()[-1])[1:-1]
        raise UserError(f"{name}: ONNX Runtime cannot load it ({reason})") from None


def verify_onnx_file(path: str) -> bool:
    """Return whether a file ends with its SHA-256; raises `UserError` when that is wrong."""
    try:
        with open_regular(path) as file:
            if file.seek(0, 2) <= _TRAILER_BYTES:
                return False
            with _mapped(file) as content:
                trailer = content[-_TRAILER_BYTES:]
                if not trailer.startswith(_TRAILER_START):
                    return False
                view = memoryview(content)[:-_TRAILER_BYTES]
                digest = hashlib.sha256(view).hexdigest()
                view.release()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if trailer[len(_TRAILER_START) :] != digest.encode():
        raise UserError(f"{path}: does not match its SHA-256: the file is damaged; write it again")
    return True


def write_onnx(model: Any, path: str) -> None:
    """Check an onnx.ModelProto as the onnx package does and write it, with its SHA-256.

    Raises `UserError` when the file cannot be written.
    """
    import onnx

    content = model.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    remove_left_overs_of(path)
    with atomic_write(path, "wb") as file:
        file.write(content)
        file.write(_TRAILER_START + hashlib.sha256(content).hexdigest().encode())
