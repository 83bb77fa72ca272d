"""Pretraining shards: writer, reader, manifest.

A folder of shards holds part-00000.npz, part-00001.npz, ... and manifest.json. Each .npz holds flat
arrays, uncompressed, so that a reader maps them into memory and nothing is ever unpickled:

    input_ids         uint16, or int32 for a vocabulary above 65,536: all sequences one after the
                      other, special tokens included, masks applied
    offsets           int64 [sequences + 1]: sequence i is input_ids[offsets[i]:offsets[i + 1]]
    masked_positions  uint16: places of the masked tokens, each inside its own sequence
    masked_ids        like input_ids: the true tokens there
    masked_offsets    int64 [sequences + 1], into the two arrays above
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import struct
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Optional

import numpy as np

from bort.errors import UserError
from bort.files import _COPY_BYTES, read_json, sha256_of, write_json

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
# The manifest of a folder that is not complete yet.
UNFINISHED_FILE = "manifest.unfinished.json"

_ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<26xHH")


def shard_name(index: int) -> str:
    """Return the file name of shard `index`."""
    return f"part-{index:05d}.npz"


def id_type(vocab_size: int) -> np.dtype:
    """Return the smallest type of the format that holds every id of a vocabulary.

    Raises `UserError` when none does.
    """
    for candidate in (np.uint16, np.int32):
        if vocab_size - 1 <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    raise UserError(f"a vocabulary of {vocab_size} tokens: shards hold ids of at most 31 bits")


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `unknown` counts `<unk>` in the text before masking."""

    file: str
    sha256: str
    documents: int
    sentences: int
    sequences: int
    tokens: int
    masked: int
    unknown: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made of, and what it holds.

    `tokenizer` has name, fingerprint, vocab_size, the special ids and the settings it was loaded
    by; `arguments` those settings that decide the instances; `inputs` path, sha256, bytes and
    documents of each text file; `shards` one entry per finished shard, in order.
    """

    tokenizer: dict[str, Any]
    arguments: dict[str, Any]
    inputs: list[dict[str, Any]]
    shards: list[ShardEntry]
    format_version: int = FORMAT_VERSION

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens of the vocabulary."""
        return self.tokenizer["vocab_size"]

    @property
    def pad_id(self) -> int:
        """Return the id that fills up short rows of a batch."""
        return self.tokenizer["pad_id"]

    @property
    def tokenizer_fingerprint(self) -> str:
        """Return the SHA-256 over all that decides the ids."""
        return self.tokenizer["fingerprint"]

    @property
    def totals(self) -> dict[str, int]:
        """Return documents, sentences, sequences, tokens, masked and unknown over all shards."""
        counts = [field.name for field in dataclasses.fields(ShardEntry)][2:]
        return {name: sum(getattr(one, name) for one in self.shards) for name in counts}

    def differences(self, other: Manifest) -> list[str]:
        """Return in words why `other` describes other data: tokenizer, arguments or inputs."""
        found = []
        if self.tokenizer_fingerprint != other.tokenizer_fingerprint:
            found.append("the tokenizer is another one")
        for name in sorted({*self.arguments, *other.arguments}):
            here, there = self.arguments.get(name), other.arguments.get(name)
            if here != there:
                found.append(f"--{name} was {here}, now {there}")
        if len(self.inputs) != len(other.inputs):
            found.append(f"{len(self.inputs)} input files, now {len(other.inputs)}")
        for here, there in zip(self.inputs, other.inputs):
            if here["sha256"] != there["sha256"]:
                found.append(f"the text of {there['path']} is not that of {here['path']} then")
        return found


def write_manifest(folder: str, name: str, manifest: Manifest) -> None:
    """Write the manifest as JSON into the folder, whole or not at all."""
    content = {**dataclasses.asdict(manifest), "totals": manifest.totals}
    path = os.path.join(folder, name)
    try:
        write_json(path, content)
    except OSError as error:
        with suppress(OSError):
            os.remove(f"{path}.tmp")
        _cannot_write(path, error)


def read_manifest(folder: str, name: str = MANIFEST_FILE) -> Manifest:
    """Read the manifest of a folder.

    Raises `UserError` when there is none, or one of another format.
    """
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        cure = "make the folder with create_pretraining_data.py"
        if os.path.exists(os.path.join(folder, UNFINISHED_FILE)):
            cure = "create_pretraining_data.py was interrupted: run it again, it goes on"
        raise UserError(f"{folder}: holds no complete set of shards ({name}); {cure}")
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: is of format {version}, this program reads format {FORMAT_VERSION}; "
            "make the shards again"
        )
    shards = [ShardEntry(**entry) for entry in content["shards"]]
    return Manifest(content["tokenizer"], content["arguments"], content["inputs"], shards)


class ShardWriter:
    """Writes one shard block by block; memory holds no more than one block.

    The members grow in nameless temporary files beside `path`, which vanish with the process.
    `finish` joins them to the .npz and puts it in place. Used as a context manager: leaving it
    without `finish` leaves nothing behind.
    """

    def __init__(self, path: str, ids: np.dtype) -> None:
        self._path = path
        self._types = {
            "input_ids": np.dtype(ids),
            "offsets": np.dtype(np.int64),
            "masked_positions": np.dtype(np.uint16),
            "masked_ids": np.dtype(ids),
            "masked_offsets": np.dtype(np.int64),
        }
        self._counts = dict.fromkeys(self._types, 0)
        self._last_offsets = {"offsets": 0, "masked_offsets": 0}
        folder = os.path.dirname(path)
        try:
            self._files = {
                name: tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
                for name in self._types
            }
            for name in self._last_offsets:
                self._append(name, np.zeros(1))
        except OSError as error:
            _cannot_write(path, error)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        for file in self._files.values():
            # Closing writes out what is buffered, which fails again on a full disk.
            with suppress(OSError):
                file.close()

    def write(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        masked_positions: np.ndarray,
        masked_ids: np.ndarray,
        masked_lengths: np.ndarray,
    ) -> None:
        """Append sequences: flat arrays, and how much of them belongs to each sequence.

        Raises `UserError` when the disk is full.
        """
        try:
            self._append("input_ids", input_ids)
            self._append_lengths("offsets", lengths)
            self._append("masked_positions", masked_positions)
            self._append("masked_ids", masked_ids)
            self._append_lengths("masked_offsets", masked_lengths)
        except OSError as error:
            _cannot_write(self._path, error)

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, self._types[name]).data)
        self._counts[name] += len(values)

    def _append_lengths(self, name: str, lengths: np.ndarray) -> None:
        ends = self._last_offsets[name] + np.cumsum(lengths, dtype=np.int64)
        self._last_offsets[name] = int(ends[-1])
        self._append(name, ends)

    def finish(self, documents: int, sentences: int, unknown: int) -> ShardEntry:
        """Put the shard in place and return its entry for the manifest.

        Raises `UserError` when the disk is full.
        """
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "wb") as file:
                self._join(file)
                file.flush()
                os.fsync(file.fileno())
            digest = sha256_of(temporary)
            os.replace(temporary, self._path)
        except OSError as error:
            _cannot_write(self._path, error)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)
        return ShardEntry(
            file=os.path.basename(self._path),
            sha256=digest,
            documents=documents,
            sentences=sentences,
            sequences=self._counts["offsets"] - 1,
            tokens=self._counts["input_ids"],
            masked=self._counts["masked_ids"],
            unknown=unknown,
        )

    def _join(self, file: Any) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, values in self._files.items():
                values.seek(0)
                # ZipInfo's own date, 1980: the same data give the same bytes.
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    member.write(_npy_header(self._types[name], self._counts[name], file.tell()))
                    shutil.copyfileobj(values, member, _COPY_BYTES)


def _npy_header(kind: np.dtype, count: int, start: int) -> bytes:
    """Return the .npy header that makes the values begin at a multiple of 64 in the archive."""
    described = {"descr": kind.str, "fortran_order": False, "shape": (count,)}
    plain = repr(described)
    length = len(np.lib.format.magic(1, 0)) + 2 + len(plain) + 1
    text = plain + " " * (-(start + length) % _ALIGNMENT) + "\n"
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text.encode("latin1")


def _cannot_write(path: str, error: OSError) -> NoReturn:
    raise UserError(
        f"{path}: cannot be written ({error.strerror}); "
        "make room and run the same command again, it goes on after the shards that are finished"
    ) from None


class Shard:
    """One shard, mapped into memory: opening costs nothing, reading costs the pages touched.

    `input_ids`, `offsets`, `masked_positions`, `masked_ids` and `masked_offsets` are the members,
    read-only.
    """

    def __init__(self, path: str) -> None:
        """Open a shard; raises `UserError` when it is missing, truncated or not a shard."""
        self.path = path
        try:
            members = _map_members(path)
            self.input_ids = members["input_ids"]
            self.offsets = members["offsets"]
            self.masked_positions = members["masked_positions"]
            self.masked_ids = members["masked_ids"]
            self.masked_offsets = members["masked_offsets"]
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: cannot be read as a shard ({error}); "
                "delete it and run create_pretraining_data.py again, it makes what is missing"
            ) from None

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (input_ids, masked_positions, masked_ids) of one sequence, without copying."""
        start, end = self.offsets[index : index + 2]
        masked_start, masked_end = self.masked_offsets[index : index + 2]
        return (
            self.input_ids[start:end],
            self.masked_positions[masked_start:masked_end],
            self.masked_ids[masked_start:masked_end],
        )

    def check(self, entry: ShardEntry, verify: bool) -> None:
        """Raise `UserError` unless the shard is the one of the manifest's entry.

        Compares the counts; with `verify` also the SHA-256, for which the whole file is read.
        """
        expected = (entry.sequences, entry.tokens, entry.masked)
        found = (self.num_sequences, len(self.input_ids), len(self.masked_ids))
        if found != expected:
            raise UserError(
                f"{self.path}: holds {found} sequences, tokens and masked tokens where "
                f"the manifest says {expected}; make the shards again in an empty folder"
            )
        if verify and sha256_of(self.path) != entry.sha256:
            raise UserError(
                f"{self.path}: its SHA-256 is not that of the manifest; "
                "delete it and run create_pretraining_data.py again, it makes what is missing"
            )


def _map_members(path: str) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    # A plain array: slices of the subclass take ten times as long.
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    return {
        member.filename[: -len(".npy")]: _map_member(content, member)
        for member in members
        if member.compress_type == zipfile.ZIP_STORED
    }


def _map_member(content: np.ndarray, member: zipfile.ZipInfo) -> np.ndarray:
    """Return the array of one stored .npy member, as a view of the mapped file."""
    local = content[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
    start = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(local.tobytes()))
    end = start + member.file_size
    # The header of a flat array is far shorter than this.
    header = io.BytesIO(content[start : min(end, start + 1024)].tobytes())
    np.lib.format.read_magic(header)
    shape, _, kind = np.lib.format.read_array_header_1_0(header)
    if kind.kind not in "iu":
        raise ValueError(f"{member.filename} holds {kind}, not whole numbers")
    return content[start + header.tell() : end].view(kind).reshape(shape)


class ShardSet:
    """All sequences of a folder of shards, numbered through.

    `lengths` are the tokens of each sequence, int64 [num_sequences].
    """

    def __init__(self, manifest: Manifest, shards: list[Shard]) -> None:
        self.manifest = manifest
        self.shards = shards
        self.lengths = np.concatenate([shard.lengths for shard in shards])
        self._starts = np.cumsum([0, *(shard.num_sequences for shard in shards)])

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences of all shards."""
        return len(self.lengths)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (input_ids, masked_positions, masked_ids) of one sequence, without copying."""
        shard, row = self._place(index)
        return self.shards[shard].sequence(row)

    def masked(self, index: int) -> tuple[int, slice]:
        """Return the shard of a sequence, and where its masked tokens lie among the shard's."""
        shard, row = self._place(index)
        start, end = self.shards[shard].masked_offsets[row : row + 2]
        return shard, slice(int(start), int(end))

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])


def open_shards(folder: str, verify: bool = False) -> ShardSet:
    """Open a folder that create_pretraining_data.py has completed.

    Args:
        folder: with manifest.json and its shards.
        verify: also compare each shard's SHA-256, which reads everything once.

    Raises `UserError` that names the shard which is missing, truncated or not the manifest's.
    """
    manifest = read_manifest(folder)
    shards = []
    for entry in manifest.shards:
        shard = Shard(os.path.join(folder, entry.file))
        shard.check(entry, verify)
        shards.append(shard)
    return ShardSet(manifest, shards)
