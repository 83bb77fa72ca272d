"""Pretraining shards: writer, reader, manifest.

A folder of shards holds part-00000.npz, part-00001.npz, ... and manifest.json. Each .npz holds flat
arrays, uncompressed, so that a reader maps them into memory and nothing is ever unpickled:

    input_ids         uint16, or int32 for a vocabulary above 65,536: all sequences concatenated,
                      special tokens included, masks applied
    offsets           int64 [sequences + 1]: sequence i is input_ids[offsets[i]:offsets[i + 1]]
    masked_positions  uint16: positions of the masked tokens, relative to their sequence
    masked_ids        like input_ids: the original tokens there
    masked_offsets    int64 [sequences + 1], into the two arrays above

A folder that was verified has .verified.json too: the size and times of each verified shard.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import struct
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Iterator, Optional, Sequence

import numpy as np

from bort.errors import UserError, escaped, quoted
from bort.files import (
    allow_open_files,
    atomic_path,
    is_lfs_pointer,
    open_regular,
    read_json,
    read_json_as,
    require_open,
    sha256_of,
    write_json,
)
from bort.tokenization import TOKENIZER_FOLDER, Tokenizer, load_tokenizer_folder
from bort.types import JSONObject
from bort.verified import Verifiable, verify_changed
from data.corpus import TextFile

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
# The manifest of a folder that is not complete yet.
UNFINISHED_FILE = "manifest.unfinished.json"
VERIFIED_FILE = ".verified.json"

_SHARD = re.compile(r"part-[0-9]{5,}\.npz")
_COPY_BYTES = 1 << 20
_ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<26xHH")
_ZIP64_LIMIT = 0xFFFFFFFF
_ZIP64_VERSION = 45
# The header of a flat array, as written here and by NumPy: type and number of values.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(<[iu][248])', 'fortran_order': False, 'shape': \(([0-9]{1,18}),\),? ?\} *\n"
)
# Tokens whose ids are checked at once, which bounds memory.
_CHECKED_AT_ONCE = 1 << 22
_MAKE_AGAIN = "delete it and run create_pretraining_data.py again: it makes missing shards"

# input_ids, masked_positions and masked_ids of one sequence.
MaskedSequence = tuple[np.ndarray, np.ndarray, np.ndarray]


def shard_name(index: int) -> str:
    """Return the file name of shard `index`."""
    return f"part-{index:05d}.npz"


def shard_number(name: str) -> int:
    """Return the number in the file name of a shard; names with six digits do not sort as text."""
    return int(name[len("part-") : -len(".npz")])


def is_output(folder: str, path: str) -> bool:
    """Return whether a path is that of a shard, a manifest or the tokenizer of a folder."""
    place = os.path.realpath(os.path.dirname(path))  # either may be reached by a link
    path = os.path.join(place, os.path.basename(path))
    name, *below = os.path.relpath(path, os.path.realpath(folder)).split(os.sep)
    if below:
        return name == TOKENIZER_FOLDER
    return name in (MANIFEST_FILE, UNFINISHED_FILE) or bool(_SHARD.fullmatch(name))


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
    """The manifest's entry of one shard; `unknown` counts `<unk>` in the text before masking."""

    file: str
    sha256: str
    documents: int
    sentences: int
    sequences: int
    tokens: int
    masked: int
    unknown: int


@dataclass(frozen=True)
class TokenizerEntry:
    """The manifest's entry of the tokenizer; `settings` are the flags it was loaded by."""

    fingerprint: str
    vocab_size: int
    pad_id: int
    name: str = "tokenizer"
    bos_id: Optional[int] = None
    eos_id: Optional[int] = None
    unk_id: Optional[int] = None
    mask_id: Optional[int] = None
    settings: dict[str, Optional[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made of, and what it holds.

    `arguments` are the settings that decide the sequences; `inputs` the text files; `shards` has
    one entry per finished shard, in order.
    """

    tokenizer: TokenizerEntry
    arguments: JSONObject
    inputs: list[TextFile]
    shards: list[ShardEntry]
    format_version: int = FORMAT_VERSION

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens of the vocabulary."""
        return self.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        """Return the id that pads short rows of a batch."""
        return self.tokenizer.pad_id

    @property
    def tokenizer_fingerprint(self) -> str:
        """Return the SHA-256 over all that decides the ids."""
        return self.tokenizer.fingerprint

    @property
    def totals(self) -> dict[str, int]:
        """Return documents, sentences, sequences, tokens, masked and unknown over all shards."""
        counts = [field.name for field in dataclasses.fields(ShardEntry)][2:]
        return {name: sum(getattr(entry, name) for entry in self.shards) for name in counts}

    def differences(self, other: Manifest) -> list[str]:
        """Return in words why `other` describes other data: tokenizer, arguments or inputs."""
        found = []
        if self.tokenizer_fingerprint != other.tokenizer_fingerprint:
            found.append("the tokenizer differs")
        for name in sorted({*self.arguments, *other.arguments}):
            here, there = self.arguments.get(name), other.arguments.get(name)
            if here != there:
                found.append(f"--{name} was {here}, now {there}")
        return [*found, *_other_inputs(self.inputs, other.inputs)]


def _other_inputs(before: Sequence[TextFile], now: Sequence[TextFile]) -> list[str]:
    """Return in words why input files are others; their names may differ, their order may not."""
    if [file.sha256 for file in before] == [file.sha256 for file in now]:
        return []
    known, given = {file.sha256 for file in before}, {file.sha256 for file in now}
    missing = dict.fromkeys(file.path for file in before if file.sha256 not in given)
    new = dict.fromkeys(file.path for file in now if file.sha256 not in known)
    found = []
    if len(before) != len(now):
        found.append(f"there were {len(before)} input files, now {len(now)}")
    for what, paths in (
        ("with another text", [path for path in new if path in missing]),
        ("new", [path for path in new if path not in missing]),
        ("missing", [path for path in missing if path not in new]),
    ):
        if paths:
            others = f" and {len(paths) - 1:,} more" * (len(paths) > 1)
            found.append(f"{what}: {paths[0]}{others}")
    return found or ["the input files come in another order"]


def shards_tokenizer(folder: str, manifest: Manifest) -> Optional[Tokenizer]:
    """Return the tokenizer beside the shards of a folder; None when there is none.

    Raises `UserError` when it is not the one that the shards were made with.
    """
    path = os.path.join(folder, TOKENIZER_FOLDER)
    tokenizer = load_tokenizer_folder(path)
    if tokenizer and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{path}: is not the tokenizer of the shards; restore the folder, or make the shards "
            "again"
        )
    return tokenizer


def write_manifest(folder: str, name: str, manifest: Manifest) -> None:
    """Write the manifest as JSON into the folder, atomically."""
    content = {**dataclasses.asdict(manifest), "totals": manifest.totals}
    with _with_cure():
        write_json(os.path.join(folder, name), content)


def read_manifest(folder: str, name: str = MANIFEST_FILE) -> Manifest:
    """Read the manifest of a folder.

    Raises `UserError` when there is none, or one that is damaged or of another format.
    """
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        cure = "make the folder with create_pretraining_data.py"
        if os.path.exists(os.path.join(folder, UNFINISHED_FILE)):
            cure = "create_pretraining_data.py was interrupted: run it again, it resumes"
        if not os.path.exists(folder):
            raise UserError(f"{folder}: not found; {cure}")
        raise UserError(f"{folder}: holds no complete set of shards ({name}); {cure}")
    if is_lfs_pointer(path):
        raise UserError(f"{path}: is a Git LFS pointer; fetch the folder with git lfs pull")
    content = read_json(path)
    if isinstance(content, dict) and "teacher_sha256" in content:
        raise UserError(f"{folder}: holds a teacher cache, not shards; name another folder")
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: is of format {quoted(version)}, this program reads format {FORMAT_VERSION}; "
            "make the shards again"
        )
    try:
        manifest = read_json_as(path, Manifest)
    except UserError as error:
        raise UserError(f"{error}; make the shards again") from None
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: str, manifest: Manifest) -> None:
    """Raise `UserError` for values that would lead out of the folder or out of the vocabulary."""
    for entry in manifest.shards:
        if not _SHARD.fullmatch(entry.file):
            raise UserError(
                f"{path}: {quoted(entry.file)} is not the name of a shard in its folder"
            )
    tokenizer = manifest.tokenizer
    id_type(tokenizer.vocab_size)
    for role in ("pad_id", "bos_id", "eos_id", "unk_id", "mask_id"):
        value = getattr(tokenizer, role)
        if value is not None and not 0 <= value < tokenizer.vocab_size:
            raise UserError(
                f"{path}: {role} {value} is outside the vocabulary of {tokenizer.vocab_size} "
                "tokens; make the shards again"
            )


@contextmanager
def _with_cure() -> Iterator[None]:
    """Add to an error of writing what to do about it."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{error}; free some space and run the same command again: finished shards are kept"
        ) from None


class ShardWriter:
    """Writes one shard block by block; memory holds no more than one block.

    The arrays grow in unnamed temporary files beside `path`, which the system deletes when the
    process ends. `finish` joins them to the .npz. Use it as a context manager: without `finish`
    it leaves nothing behind.
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
        with self._writing():
            self._files = {
                name: tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
                for name in self._types
            }
            for name in self._last_offsets:
                self._append(name, np.zeros(1))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        for file in self._files.values():
            # Closing flushes the buffer, which fails again on a full disk.
            with suppress(OSError):
                file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with _with_cure():
            try:
                yield
            except OSError as error:
                raise UserError(f"{self._path}: cannot be written ({error.strerror})") from None

    def write(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        masked_positions: np.ndarray,
        masked_ids: np.ndarray,
        masked_lengths: np.ndarray,
    ) -> None:
        """Append sequences: flat arrays [tokens] or [masked], and lengths [sequences].

        Raises `UserError` when the disk is full.
        """
        with self._writing():
            self._append("input_ids", input_ids)
            self._append_lengths("offsets", lengths)
            self._append("masked_positions", masked_positions)
            self._append("masked_ids", masked_ids)
            self._append_lengths("masked_offsets", masked_lengths)

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, self._types[name]).data)
        self._counts[name] += len(values)

    def _append_lengths(self, name: str, lengths: np.ndarray) -> None:
        if len(lengths):
            ends = self._last_offsets[name] + np.cumsum(lengths, dtype=np.int64)
            self._last_offsets[name] = int(ends[-1])
            self._append(name, ends)

    def finish(self, documents: int, sentences: int, unknown: int) -> ShardEntry:
        """Put the shard in place and return its entry for the manifest.

        Raises `UserError` when the disk is full.
        """
        with _with_cure(), atomic_path(self._path) as temporary:
            with open(temporary, "xb") as file:
                self._join(file)
            digest = sha256_of(temporary)
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
                # The date of an archive's member, 1980, is that of ZipInfo: equal data give
                # equal bytes.
                with archive.open(_Member(f"{name}.npy"), "w", force_zip64=True) as member:
                    member.write(_npy_header(self._types[name], self._counts[name], file.tell()))
                    shutil.copyfileobj(values, member, _COPY_BYTES)


class _Member(zipfile.ZipInfo):
    """A member of an archive with the same local header in every version of Python.

    That of Python 3.11.4 and later: earlier ones write the sizes of a small member twice.
    """

    def FileHeader(self, zip64: Optional[bool] = None) -> bytes:  # noqa: N802 (zipfile's name)
        """Return the local header, always with the ZIP64 field."""
        self.extract_version = self.create_version = _ZIP64_VERSION
        name = self.filename.encode("ascii")
        extra = struct.pack("<HHQQ", 1, 16, self.file_size, self.compress_size)
        # Of `date_time`, 1980-01-01 00:00:00: the day and month are 1, the rest is 0.
        header = struct.pack(
            "<4s2B4HL2L2H", b"PK\003\004", self.extract_version, 0, self.flag_bits,
            self.compress_type, 0, 1 << 5 | 1, self.CRC, _ZIP64_LIMIT, _ZIP64_LIMIT,
            len(name), len(extra),
        )  # fmt: skip
        return header + name + extra


def _npy_header(dtype: np.dtype, count: int, start: int) -> bytes:
    """Return the .npy header that aligns the values to a multiple of 64 bytes in the archive."""
    described = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    plain = repr(described)
    length = len(np.lib.format.magic(1, 0)) + 2 + len(plain) + 1
    text = plain + " " * (-(start + length) % _ALIGNMENT) + "\n"
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text.encode("latin1")


class Shard:
    """One shard, mapped into memory: opening reads the offsets, the rest is read when it is used.

    `input_ids`, `offsets`, `masked_positions`, `masked_ids` and `masked_offsets` are the arrays,
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
            self._check_structure()
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; run create_pretraining_data.py again") from None
        except Exception as error:  # zipfile raises a dozen kinds for a damaged archive
            require_open(path, error)
            if is_lfs_pointer(path):
                raise UserError(
                    f"{path}: is a Git LFS pointer, not the shard; fetch it with git lfs pull"
                ) from None
            reason = escaped(str(error)) or type(error).__name__
            raise UserError(
                f"{path}: cannot be read as a shard ({reason}); {_MAKE_AGAIN}"
            ) from None

    def _check_structure(self) -> None:
        """Raise `ValueError` unless types and offsets fit together."""
        types = (self.offsets.dtype, self.masked_offsets.dtype, self.masked_positions.dtype)
        if types != (np.int64, np.int64, np.uint16):
            raise ValueError(f"offsets and positions of the types {types}")
        if self.input_ids.dtype not in (np.uint16, np.int32):
            raise ValueError(f"ids of the type {self.input_ids.dtype}")
        if self.masked_ids.dtype != self.input_ids.dtype:
            raise ValueError("ids of two types")
        if len(self.masked_ids) != len(self.masked_positions):
            raise ValueError("as many masked ids as positions were expected")
        if len(self.offsets) != len(self.masked_offsets):
            raise ValueError("as many masked offsets as offsets were expected")
        _check_offsets(self.offsets, len(self.input_ids), shortest=1)
        _check_offsets(self.masked_offsets, len(self.masked_ids), shortest=0)

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each sequence, int32 [sequences]."""
        return np.diff(self.offsets).astype(np.int32)

    def sequence(self, index: int) -> MaskedSequence:
        """Return (input_ids, masked_positions, masked_ids) of one sequence, without copying."""
        start, end = self.offsets[index : index + 2]
        masked_start, masked_end = self.masked_offsets[index : index + 2]
        return (
            self.input_ids[start:end],
            self.masked_positions[masked_start:masked_end],
            self.masked_ids[masked_start:masked_end],
        )

    def check_counts(self, entry: ShardEntry) -> None:
        """Raise `UserError` unless the numbers are those of the manifest's entry."""
        expected = (entry.sequences, entry.tokens, entry.masked)
        found = (self.num_sequences, len(self.input_ids), len(self.masked_ids))
        if found != expected:
            raise UserError(
                f"{self.path}: holds {found} sequences, tokens and masked tokens where "
                f"the manifest says {expected}; make the shards again in an empty folder"
            )

    def verify(self, entry: ShardEntry, vocab_size: int) -> None:
        """Raise `UserError` unless the SHA-256 is the entry's, and ids and positions are in range.

        Reads the whole file.
        """
        if sha256_of(self.path) != entry.sha256:
            raise UserError(f"{self.path}: its SHA-256 is not the manifest's; {_MAKE_AGAIN}")
        for first, last in self._parts():
            tokens = slice(self.offsets[first], self.offsets[last])
            masked = slice(self.masked_offsets[first], self.masked_offsets[last])
            lengths = np.diff(self.offsets[first : last + 1])
            # The length of its sequence for each masked token.
            lengths = np.repeat(lengths, np.diff(self.masked_offsets[first : last + 1]))
            self._check_range(self.input_ids[tokens], vocab_size, "token id")
            self._check_range(self.masked_ids[masked], vocab_size, "masked token id")
            self._check_range(self.masked_positions[masked], lengths, "masked position")

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of sequences of a bounded number of tokens, at least one sequence each."""
        first = 0
        while first < self.num_sequences:
            end = self.offsets[first] + _CHECKED_AT_ONCE
            last = max(int(np.searchsorted(self.offsets, end, side="right")) - 1, first + 1)
            yield first, last
            first = last

    def _check_range(self, values: np.ndarray, limit: Any, what: str) -> None:
        wrong = (values < 0) | (values >= limit)
        if wrong.any():
            raise UserError(
                f"{self.path}: the {what} {values[wrong.argmax()]} is out of range; {_MAKE_AGAIN}"
            )


def _check_offsets(offsets: np.ndarray, end: int, shortest: int) -> None:
    """Raise `ValueError` unless offsets lead from 0 to `end` in steps of at least `shortest`."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != end:
        raise ValueError("the offsets do not lead from the first value to the last")
    if (offsets[1:] - offsets[:-1] < shortest).any():
        raise ValueError("the offsets do not ascend")


def _map_members(path: str) -> dict[str, np.ndarray]:
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        # A plain array: slices of the subclass take ten times as long.
        content = np.memmap(file, np.uint8, "r").view(np.ndarray)
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
    described = _NPY_HEADER.fullmatch(header.read(struct.unpack("<H", header.read(2))[0]))
    if described is None:
        raise ValueError(f"{member.filename} is not a flat array of whole numbers")
    values = content[start + header.tell() : end].view(np.dtype(described[1].decode()))
    if len(values) != int(described[2]):
        raise ValueError(f"{member.filename} holds {len(values)} values, not {int(described[2])}")
    return values


class ShardSet:
    """All sequences of a folder of shards, numbered consecutively.

    `lengths` are the tokens of each sequence, int32 [num_sequences].
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

    def sequence(self, index: int) -> MaskedSequence:
        """Return (input_ids, masked_positions, masked_ids) of one sequence, without copying.

        Raises `UserError` when an id or a position is out of range, as a shard that was not
        verified may hold: MXNet would read and write outside its arrays.
        """
        shard, row = self._shard_of(index)
        sequence = self.shards[shard].sequence(row)
        self._check_ranges(self.shards[shard], row, *sequence)
        return sequence

    def _check_ranges(
        self,
        shard: Shard,
        row: int,
        input_ids: np.ndarray,
        masked_positions: np.ndarray,
        masked_ids: np.ndarray,
    ) -> None:
        limits = (self.manifest.vocab_size, self.manifest.vocab_size, len(input_ids))
        for values, limit in zip((input_ids, masked_ids, masked_positions), limits):
            if len(values) and (
                values.max() >= limit or (values.dtype.kind == "i" and values.min() < 0)
            ):
                raise UserError(
                    f"{shard.path}: sequence {row} holds an id or a position out of range; "
                    f"{_MAKE_AGAIN}"
                )

    def masked(self, index: int) -> tuple[int, slice]:
        """Return the shard of a sequence, and the slice of its masked tokens in the shard."""
        shard, row = self._shard_of(index)
        start, end = self.shards[shard].masked_offsets[row : row + 2]
        return shard, slice(int(start), int(end))

    def _shard_of(self, index: int) -> tuple[int, int]:
        """Return the number of a sequence's shard, and the index of the sequence in it."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])


def open_shards(folder: str, verify: bool = True, remember: bool = True) -> ShardSet:
    """Open a folder that create_pretraining_data.py has completed.

    Counts and offsets are always checked. Verification reads every shard once and compares its
    SHA-256, ids and positions; a shard that has not changed since is not read again.

    Args:
        folder: with manifest.json and its shards.
        verify: verify the shards.
        remember: False verifies every shard, whether or not it was verified before.

    Raises `UserError` that names the shard that is missing, damaged or not the manifest's.
    """
    manifest = read_manifest(folder)
    allow_open_files()
    shards = []
    for entry in manifest.shards:
        shard = Shard(os.path.join(folder, entry.file))
        shard.check_counts(entry)
        shards.append(shard)
    if not sum(shard.num_sequences for shard in shards):
        raise UserError(f"{folder}: its shards hold no sequences; make them again")
    if verify:
        files = [
            Verifiable(
                shard.path,
                (entry.sha256, manifest.vocab_size),
                partial(shard.verify, entry, manifest.vocab_size),
            )
            for shard, entry in zip(shards, manifest.shards)
        ]
        verify_changed(os.path.join(folder, VERIFIED_FILE), files, remember)
    return ShardSet(manifest, shards)
