"""The teacher's outputs on disk, so that training needs only its projection onto the vocabulary.

The teacher is frozen and the masks of a shard are fixed, so its hidden state at a masked position,
before the projection, is the same in every epoch. A cache is a folder:

    manifest.json       the teacher (shape, SHA-256 of its parameters), the tokenizer of the shards,
                        and the dtype of the rows
    projection.npz      the teacher's output matrix [vocabulary, hidden] and bias, float32
    <shard>.npy         one row [hidden] per masked position of a shard, in the shard's order; named
                        by the first 16 digits of the shard's SHA-256
    <shard>.json        the SHA-256 of these rows

While a shard is being made: <shard>.npy.partial, and <shard>.npy.partial.sums (`RowSums`).

One folder serves any number of shards, of training and of held-out data.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import IO, Callable, Iterator, Sequence

import numpy as np
from mxnet import nd
from mxnet.gluon import nn

from bort.arrays import map_npy, read_npz, write_npz
from bort.bfloat16 import add_copies, has_copies
from bort.bort import decode
from bort.communicator import Communicator, SingleProcess, lock_of_rank_0
from bort.encoder import fuse_qkv
from bort.errors import UserError, quoted
from bort.files import (
    allow_open_files,
    has_lock,
    read_json,
    read_json_as,
    require_open,
    sha256_of,
    temporary_name,
    write_json,
)
from bort.pretraining.mlm import DeviceBatch, masked_states, to_device
from bort.pretraining.row_sums import RowSums, open_no_link
from bort.progress import ProgressBar
from bort.types import Block, Context, NDArray
from bort.verified import Verifiable, verify_changed
from data.batches import collate
from data.shards import Manifest, Shard, ShardEntry, ShardSet

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PROJECTION_FILE = "projection.npz"
VERIFIED_FILE = ".verified.json"
BUILD = "scripts/build_teacher_cache.py"
ROW_DTYPES = ("float16", "float32")
_ROWS = re.compile(r"[0-9a-f]{16}\.(npy|json)")


@dataclass(frozen=True)
class CacheManifest:
    """What a cache was made with, all of which has to fit before a row is used."""

    teacher_model: str
    teacher_sha256: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden: int
    dtype: str  # of the rows
    teacher_dtype: str = "float32"  # of the teacher's matrix products
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class RowsRecord:
    """What is known of the rows of one shard; older caches have no such file."""

    sha256: str


def read_cache_manifest(folder: str) -> CacheManifest:
    """Read the manifest of a cache; raises `UserError` when there is none or of another format."""
    path = os.path.join(folder, MANIFEST_FILE)
    if not os.path.exists(path):
        raise UserError(f"--teacher_cache {folder}: is not a teacher cache; {BUILD} makes one")
    content = read_json(path)
    if isinstance(content, dict) and "shards" in content:
        raise UserError(f"{folder}: holds shards, not a teacher cache; name another folder")
    manifest = read_json_as(path, CacheManifest)
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(f"{path}: of another format version; delete {folder}, run {BUILD} again")
    if manifest.dtype not in ROW_DTYPES:
        raise UserError(
            f"{path}: dtype {quoted(manifest.dtype)} is none of {', '.join(ROW_DTYPES)}; delete "
            f"{folder}, run {BUILD} again"
        )
    return manifest


def rows_path(folder: str, entry: ShardEntry) -> str:
    """Return the path of the rows of one shard."""
    return os.path.join(folder, f"{entry.sha256[:16]}.npy")


def open_rows(folder: str, shards: ShardSet, verify: bool = True) -> list[np.ndarray]:
    """Map the rows of each shard into memory: arrays [masked positions, hidden].

    Verification reads all rows and compares their SHA-256; rows that have not changed since are
    not read again.

    Raises `UserError` when the cache was made for another vocabulary, or the rows of a shard are
    missing, short or damaged.
    """
    manifest = read_cache_manifest(folder)
    if manifest.tokenizer_fingerprint != shards.manifest.tokenizer_fingerprint:
        raise UserError(f"--teacher_cache {folder}: made for shards of another tokenizer")
    entries = shards.manifest.shards
    allow_open_files()
    rows = [_map_rows(folder, manifest, entry) for entry in entries]
    if verify:
        _verify_rows(folder, [rows_path(folder, entry) for entry in entries])
    return rows


def _verify_rows(folder: str, paths: Sequence[str], remember: bool = True) -> None:
    files = []
    for path in sorted(set(paths)):
        record = _record_path(path)
        if os.path.exists(record):
            sha256 = read_json_as(record, RowsRecord).sha256
            files.append(Verifiable(path, (sha256,), partial(_verify_sha256, path, sha256)))
    verify_changed(os.path.join(folder, VERIFIED_FILE), files, remember)


def _verify_sha256(path: str, sha256: str) -> None:
    if sha256_of(path) != sha256:
        raise UserError(
            f"{path}: its SHA-256 is not that in {os.path.basename(_record_path(path))}; the file "
            f"is damaged: delete it, run {BUILD} again"
        )


def _record_path(path: str) -> str:
    return f"{path.removesuffix('.npy')}.json"


def _map_rows(folder: str, manifest: CacheManifest, entry: ShardEntry) -> np.ndarray:
    path = rows_path(folder, entry)
    if not os.path.exists(path):
        raise UserError(
            f"{path}: missing, the rows of shard {entry.file}; run {BUILD} on its folder"
        )
    rows = _map_array(path)
    expected = (entry.masked, manifest.hidden)
    if rows.shape != expected or rows.dtype != manifest.dtype:
        raise UserError(
            f"{path}: holds {rows.dtype} {rows.shape} where shard {entry.file} needs "
            f"{manifest.dtype} {expected}; delete it, run {BUILD}"
        )
    return rows


def _map_array(path: str) -> np.ndarray:
    try:
        return map_npy(path)
    except (ValueError, OSError) as error:
        require_open(path, error)
        raise UserError(f"{path}: cannot be read ({error}); delete it, run {BUILD}") from None


class CachedTeacher:
    """A teacher whose hidden states are read from a cache and only projected."""

    def __init__(self, folder: str, devices: Sequence[Context]) -> None:
        """Load the projection; raises `UserError` when it is missing, damaged or another's."""
        manifest = read_cache_manifest(folder)
        weight, bias = _read_projection(folder, manifest)
        layer = nn.Dense(manifest.vocab_size, in_units=manifest.hidden)
        layer.initialize(ctx=list(devices))
        layer.weight.set_data(nd.array(weight))
        layer.bias.set_data(nd.array(bias))
        # The part of a model that `decode` uses, so that both kinds of teacher project alike.
        self._model = SimpleNamespace(decoder=(None, None, None, layer))

    def logits(self, batch: DeviceBatch) -> NDArray:
        """Project the hidden states [n, hidden] of a batch: logits [n, vocabulary]."""
        return self.project(batch.teacher_hidden)

    def project(self, hidden_states: NDArray) -> NDArray:
        """Return the logits [n, vocabulary] of rows [n, hidden] of the cache, as float32."""
        return decode(self._model, hidden_states)

    def use_bfloat16(self) -> None:
        """Make the projection in bfloat16 from now on."""
        add_copies([self._model.decoder[3].weight])


def _read_projection(folder: str, manifest: CacheManifest) -> tuple[np.ndarray, np.ndarray]:
    path = os.path.join(folder, PROJECTION_FILE)
    cure = f"delete {folder}, run {BUILD} again"
    try:
        arrays = read_npz(path)
        weight, bias = arrays["weight"], arrays["bias"]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {cure}") from None
    except KeyError as error:
        raise UserError(f"{path}: cannot be read (it has no array {error}); {cure}") from None
    except UserError as error:
        raise UserError(f"{error}; {cure}") from None
    expected = (manifest.vocab_size, manifest.hidden)
    if weight.shape != expected or bias.shape != expected[:1]:
        raise UserError(f"{path}: holds {weight.shape}, its manifest says {expected}; {cure}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise UserError(f"{path}: has values that are not finite; {cure}")
    return weight, bias


def verify_cache(folder: str) -> tuple[int, int]:
    """Read all of a cache; returns the number of its shards and of their rows.

    Raises `UserError` for the first file that is missing, damaged or has values that are not
    finite.
    """
    manifest = read_cache_manifest(folder)
    _read_projection(folder, manifest)
    names = {name.rpartition(".")[0] for name in os.listdir(folder) if _ROWS.fullmatch(name)}
    paths = [os.path.join(folder, f"{name}.npy") for name in sorted(names)]
    count = 0
    for path in paths:
        rows = _map_array(path)
        if (rows.shape[1:], rows.dtype) != ((manifest.hidden,), manifest.dtype):
            raise UserError(f"{path}: holds {rows.dtype} {rows.shape}; run {BUILD} again")
        _check_finite(path, rows)
        count += len(rows)
    _verify_rows(folder, paths, remember=False)
    return len(paths), count


def _check_finite(path: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"{path}: has values that are not finite; delete it, run {BUILD} again")


def prepare_cache(folder: str, teacher: Block, manifest: CacheManifest) -> None:
    """Make the folder with manifest and projection; raises `UserError` for another teacher's."""
    path = os.path.join(folder, MANIFEST_FILE)
    if os.path.exists(path):
        there = asdict(read_cache_manifest(folder))
        for name, value in asdict(manifest).items():
            if there[name] != value:
                raise UserError(
                    f"{folder}: made with {name} {there[name]}, now {value}; "
                    "give another --output_dir or delete it"
                )
        return
    projection = teacher.decoder[3]
    arrays = {
        name: value.data(value.list_ctx()[0]).asnumpy()
        for name, value in (("weight", projection.weight), ("bias", projection.bias))
    }
    write_npz(os.path.join(folder, PROJECTION_FILE), arrays)
    # Last: a folder with a manifest is complete.
    write_json(path, asdict(manifest))


def distinct_shards(sets: Sequence[ShardSet]) -> list[tuple[Shard, ShardEntry]]:
    """Return the shards of some sets, each content once: two processes must not write one file."""
    distinct = {
        entry.sha256: (shard, entry)
        for shard_set in sets
        for shard, entry in zip(shard_set.shards, shard_set.manifest.shards)
    }
    return list(distinct.values())


def cache_manifest(
    teacher: Block, teacher_model: str, shards: Manifest, dtype: str
) -> CacheManifest:
    """Return the manifest of a cache of a teacher's outputs, for shards of this tokenizer."""
    return CacheManifest(
        teacher_model=teacher_model,
        teacher_sha256=parameters_sha256(teacher),
        tokenizer_fingerprint=shards.tokenizer_fingerprint,
        vocab_size=shards.vocab_size,
        hidden=teacher._units,
        dtype=dtype,
        teacher_dtype="bfloat16" if has_copies(teacher.decoder[3].weight) else "float32",
    )


def partial_path(rows: str) -> str:
    """Return the path of the unfinished rows of a shard."""
    return f"{rows}.partial"


def sums_path(rows: str) -> str:
    """Return the path of the sums of the unfinished rows of a shard."""
    return f"{partial_path(rows)}.sums"


def build_cache(
    folder: str,
    sets: Sequence[ShardSet],
    teacher: Block,
    teacher_model: str,
    dtype: str = "float16",
    batch_size: int = 16,
    communicator: Communicator | None = None,
) -> list[ShardEntry]:
    """Store a teacher's outputs for some sets of shards, which the ranks share out.

    Args:
        folder: of the cache; an interrupted call is resumed.
        sets: shards of one tokenizer.
        teacher: a model with its decoder.
        teacher_model: its name.
        dtype: of the stored rows.
        batch_size: sequences per forward pass.
        communicator: the other processes, if any.

    Returns the distinct shards' entries. Raises `UserError` when the folder is another teacher's.
    """
    communicator = communicator or SingleProcess()
    pairs, tokenizer = distinct_shards(sets), sets[0].manifest
    manifest = cache_manifest(teacher, teacher_model, tokenizer, dtype)
    with lock_of_rank_0(folder, "--output_dir", communicator):
        if communicator.rank == 0:
            prepare_cache(folder, teacher, manifest)
        communicator.barrier()
        fuse_qkv(teacher.encoder)
        mine = pairs[communicator.rank :: communicator.size]
        first = communicator.rank == 0
        total = sum(shard.num_sequences for shard, _ in mine)
        with ProgressBar("caching", total, unit="sequence", enabled=first) as progress:
            for shard, entry in mine:
                pad_id = tokenizer.pad_id
                arguments = (folder, shard, entry, teacher, manifest, pad_id, batch_size)
                cache_shard(*arguments, progress.advance, progress.found)
        communicator.barrier()
    return [entry for _, entry in pairs]


def cache_shard(
    folder: str,
    shard: Shard,
    entry: ShardEntry,
    teacher: Block,
    manifest: CacheManifest,
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
    found: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the rows of one shard; resumes what an interrupted call has left.

    Args:
        folder: a cache made by `prepare_cache`.
        shard: the shard.
        entry: what the manifest of the shards says of it.
        teacher: a model with its decoder.
        manifest: of the cache.
        pad_id: the tokenizer's.
        batch_size: sequences per forward pass.
        advance: called with the number of sequences done, for a progress bar.
        found: called with the number of sequences that were done before.
    """
    final = rows_path(folder, entry)
    if os.path.exists(final):
        found(shard.num_sequences)
        return
    unfinished = partial_path(final)
    try:
        with _opened_rows(final) as (handle, unfinished, sums):
            done = _resume(handle, sums, shard, manifest, batch_size)
            found(done)
            for rows, count in _teacher_rows(shard, done, teacher, pad_id, batch_size):
                content = rows.astype(manifest.dtype).tobytes()
                handle.write(content)
                handle.flush()
                done += count
                sums.append(done, content)
                advance(count)
            os.fsync(handle.fileno())
        # First: rows that are there have their SHA-256.
        write_json(_record_path(final), asdict(RowsRecord(sha256_of(unfinished))))
    except OSError as error:
        raise UserError(
            f"{unfinished}: cannot be written ({error.strerror}); free space and rerun the same "
            "command to resume"
        ) from None
    os.replace(unfinished, final)
    with suppress(FileNotFoundError):
        os.remove(sums.path)


@contextmanager
def _opened_rows(final: str) -> Iterator[tuple[IO[bytes], str, RowSums]]:
    """Give the open file of unfinished rows, its path and its sums; new when another job writes.

    A symbolic link in place of one of them is an `OSError`.
    """
    path, sums = partial_path(final), sums_path(final)
    with ExitStack() as stack:
        handle = stack.enter_context(open_no_link(path, "ab"))
        if not has_lock(handle, path):
            path, sums = temporary_name(final), temporary_name(sums)
            handle = stack.enter_context(open(path, "xb"))
        yield handle, path, stack.enter_context(closing(RowSums(sums)))


def _resume(
    handle: IO[bytes], sums: RowSums, shard: Shard, manifest: CacheManifest, batch_size: int
) -> int:
    """Leave the header and the undamaged rows of whole batches in the file; return their sequences.

    Whole batches, because the last bits of a row depend on which batch it was computed in.
    """
    header = _header((len(shard.masked_ids), manifest.hidden), manifest.dtype)
    row_bytes = manifest.hidden * np.dtype(manifest.dtype).itemsize

    def bytes_until(sequences: int) -> int:
        return int(shard.masked_offsets[sequences]) * row_bytes

    with open(handle.name, "rb") as reader:
        has_header = reader.read(len(header)) == header
        total = shard.num_sequences if has_header else 0
        done = sums.undamaged(reader, bytes_until, total, batch_size)
    if not has_header:
        handle.truncate(0)
        handle.write(header)
    handle.truncate(len(header) + bytes_until(done))
    return done


def _header(shape: tuple[int, int], dtype: str) -> bytes:
    """Return the .npy header of an array."""
    written = io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(written, described)
    return written.getvalue()


def _teacher_rows(
    shard: Shard, start: int, teacher: Block, pad_id: int, batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    device = next(iter(teacher.collect_params().values())).list_ctx()[0]
    for first in range(start, shard.num_sequences, batch_size):
        numbers = np.arange(first, min(first + batch_size, shard.num_sequences))
        batch = collate([shard.sequence(n) for n in numbers], pad_id)
        if len(batch.labels):
            rows = masked_states(teacher, to_device(batch, device)).asnumpy()
        else:
            rows = np.empty((0, teacher._units), np.float32)
        yield rows, len(numbers)


def parameters_sha256(model: Block) -> str:
    """Return a SHA-256 over the names and values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model._collect_params_with_prefix().items()):
        digest.update(name.encode())
        digest.update(parameter.data(parameter.list_ctx()[0]).asnumpy().tobytes())
    return digest.hexdigest()
