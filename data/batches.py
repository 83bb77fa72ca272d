"""Batches of pretraining sequences: length buckets, padding, and an order that can be resumed.

The sampler numbers the micro-batches of an endless stream from 0. The contents of micro-batch k
are a pure function of (seed, k): they depend neither on the number of ranks nor on interruptions.
Rank r of W ranks takes micro-batches r, r + W, ...; each epoch uses every sequence once.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Generator, Iterable, NamedTuple, Optional, Sequence, TypeVar

import numpy as np

from bort.config import build
from bort.errors import UserError
from bort.tokenization import TOKENIZER_FOLDER
from bort.types import JSONObject
from data.masking import DynamicMasking, MaskingSettings, MaskingTable
from data.shards import MaskedSequence, ShardSet, shards_tokenizer

Item = TypeVar("Item")
Made = TypeVar("Made")

# The version of the order of the data: a run cannot be resumed with another one.
SAMPLER_VERSION = 2
# A bucket is shuffled, then sorted by length within windows of this many batches, at most half of
# the bucket. A larger window would pad a little less (SST-2: 1.02 tokens per real token, with 100
# batches 1.002), but the same sequences would meet in every epoch.
SHUFFLE_WINDOW = 8
# Sequences that are processed at once, which bounds memory.
_AT_ONCE = 1 << 16


class Batch(NamedTuple):
    """One padded micro-batch."""

    input_ids: np.ndarray  # [batch, length] int32; short rows end with padding
    valid_length: np.ndarray  # [batch] int32
    masked_positions: np.ndarray  # [n] int32, into the flattened [batch * length] grid
    labels: np.ndarray  # [n] int32, the original tokens there
    teacher_hidden: Optional[np.ndarray] = None  # [n, hidden], from a teacher cache

    @property
    def tokens(self) -> int:
        """Return the number of tokens without padding."""
        return int(self.valid_length.sum())


class BucketSampler:
    """Decides which sequences form which micro-batch.

    Sequences of similar length share a bucket and are sorted by length within it, so that a batch
    needs little padding. An epoch takes 4 bytes per sequence and 4 per batch, the buckets 4 bytes
    per sequence (twice that above 2^31 sequences).

    Args:
        lengths: [sequences], in tokens.
        batch_size: sequences per micro-batch; with `use_avg_len` about that many tokens.
        num_buckets: buckets of equal width between the shortest and the longest sequence.
        seed: for shuffling; None, for evaluation, sorts each whole bucket and begins with the
            longest sequences: the memory that they have freed is enough for all that follow.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        num_buckets: int,
        use_avg_len: bool = False,
        seed: int | None = None,
    ) -> None:
        self._seed = seed
        self._lengths = lengths
        edges = np.linspace(lengths.min() - 1, lengths.max(), num_buckets + 1)
        widths = np.unique(np.ceil(edges[1:]).astype(np.int64))
        bucket_of = _buckets_of(lengths, widths)
        used, counts = np.unique(bucket_of, return_counts=True)
        self.widths = widths[used]  # of the buckets that have sequences
        self._buckets = np.empty(len(lengths), np.int32 if len(lengths) < 1 << 31 else np.int64)
        self._bounds = np.append(0, np.cumsum(counts))  # of each bucket in `_buckets`
        for number, bucket in enumerate(used):
            start, end = self._bounds[number : number + 2]
            self._buckets[start:end] = np.flatnonzero(bucket_of == bucket)
        self._sizes = [
            max(1, round(batch_size / int(width))) if use_avg_len else batch_size
            for width in self.widths
        ]
        batches = [-(-int(count) // size) for count, size in zip(counts, self._sizes)]
        self._first_batches = np.append(0, np.cumsum(batches))  # of each bucket
        self.batches_per_epoch = sum(batches)
        self._held: _Epoch | None = None

    def __call__(self, position: int) -> np.ndarray:
        """Return the sequence indices, int64 [batch], of micro-batch `position` of the stream."""
        number, index = divmod(position, self.batches_per_epoch)
        # Read once: another thread may be in another epoch.
        epoch = self._held
        if epoch is None or epoch.number != number:
            epoch = self._held = None  # never hold two epochs
            epoch = self._held = self._epoch(number)
        batch = int(epoch.batches[index])
        bucket = int(np.searchsorted(self._first_batches, batch, side="right")) - 1
        first, end = self._bounds[bucket : bucket + 2]
        start = first + (batch - self._first_batches[bucket]) * self._sizes[bucket]
        return epoch.sequences[start : min(start + self._sizes[bucket], end)].astype(np.int64)

    def epoch_of(self, position: int) -> int:
        """Return the epoch, from 0, of micro-batch `position`."""
        return position // self.batches_per_epoch

    def _epoch(self, number: int) -> _Epoch:
        generator = None if self._seed is None else np.random.default_rng([self._seed, number])
        sequences = self._buckets.copy()
        for bucket, size in enumerate(self._sizes):
            members = sequences[self._bounds[bucket] : self._bounds[bucket + 1]]  # a view
            window = len(members)
            if generator is not None:
                generator.shuffle(members)
                half = max(1, -(-len(members) // size) // 2)
                window = min(SHUFFLE_WINDOW, half) * size
            _sort_windows(members, self._lengths, window)
        batches = np.arange(self.batches_per_epoch, dtype=self._buckets.dtype)
        if generator is None:
            return _Epoch(number, sequences, batches[::-1])
        generator.shuffle(batches)
        return _Epoch(number, sequences, batches)


class _Epoch(NamedTuple):
    """The order of one epoch in flat arrays."""

    number: int
    sequences: np.ndarray  # [sequences], bucket by bucket, a bucket's batches one after the other
    batches: np.ndarray  # [batches]: the order of the batches


def _buckets_of(lengths: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the bucket [sequences] of each sequence, in the smallest type that holds them."""
    dtype = np.min_scalar_type(len(widths))
    parts = [
        np.searchsorted(widths, lengths[start : start + _AT_ONCE]).astype(dtype)
        for start in range(0, len(lengths), _AT_ONCE)
    ]
    return np.concatenate(parts)


def _sort_windows(sequences: np.ndarray, lengths: np.ndarray, window: int) -> None:
    """Sort consecutive windows of sequence indices by length, stably and in place."""
    whole = len(sequences) - len(sequences) % window
    step = max(1, _AT_ONCE // window) * window
    for start in range(0, whole, step):
        windows = sequences[start : min(start + step, whole)].reshape(-1, window)  # a view
        order = np.argsort(lengths[windows], axis=1, kind="stable")
        windows[:] = np.take_along_axis(windows, order, axis=1)
    rest = sequences[whole:]
    rest[:] = rest[np.argsort(lengths[rest], kind="stable")]


def pad(
    rows: Sequence[np.ndarray], pad_id: int, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows of token ids at the end to `width`, by default that of the longest row.

    Returns ids [rows, width] and the lengths before padding [rows], both int32.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.full((len(rows), lengths.max() if width is None else width), pad_id, np.int32)
    for padded, row in zip(ids, rows):
        padded[: len(row)] = row
    return ids, lengths


def collate(sequences: Sequence[MaskedSequence], pad_id: int) -> Batch:
    """Pad sequences (input_ids, masked_positions, masked_ids) to one micro-batch."""
    input_ids, valid_length = pad([ids for ids, _, _ in sequences], pad_id)
    width = input_ids.shape[1]
    # Positions within a sequence -> positions in the flattened [batch * width] grid.
    positions = [
        positions.astype(np.int32) + row * width for row, (_, positions, _) in enumerate(sequences)
    ]
    labels = [masked_ids.astype(np.int32) for _, _, masked_ids in sequences]
    return Batch(input_ids, valid_length, np.concatenate(positions), np.concatenate(labels))


class PretrainingLoader:
    """Makes micro-batches of a set of shards by their number in the endless stream.

    Args:
        shards: the sequences.
        sampler: the order.
        pad_id: the tokenizer's.
        teacher_rows: of a teacher cache, one array [masked positions, hidden] per shard.
        masking: draws the masks of each epoch; None uses those of the shards.
    """

    def __init__(
        self,
        shards: ShardSet,
        sampler: BucketSampler,
        pad_id: int,
        teacher_rows: Optional[Sequence[np.ndarray]] = None,
        masking: Optional[DynamicMasking] = None,
    ) -> None:
        if teacher_rows is not None and masking is not None:
            raise UserError("--dynamic_masking with --teacher_cache: it holds the shards' masks")
        self._shards = shards
        self.sampler = sampler
        self._pad_id = pad_id
        self._teacher_rows = teacher_rows
        self._masking = masking

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches that use every sequence once."""
        return self.sampler.batches_per_epoch

    def __call__(self, position: int) -> Batch:
        """Return micro-batch `position`.

        Raises `UserError` for ids that are out of range, and for rows that are not finite.
        """
        indices = self.sampler(position)
        sequences = [self._shards.sequence(int(index)) for index in indices]
        if self._masking is not None:
            epoch = self.sampler.epoch_of(position)
            sequences = [
                self._masking(*sequence, epoch, int(index))
                for index, sequence in zip(indices, sequences)
            ]
        batch = collate(sequences, self._pad_id)
        if self._teacher_rows is None:
            return batch
        spans = map(self._shards.masked, indices)
        hidden = np.concatenate([self._teacher_rows[shard][span] for shard, span in spans])
        if not np.isfinite(hidden).all():
            raise UserError(
                "--teacher_cache: has rows with values that are not finite; find them with "
                "scripts/verify.py, delete those files, run scripts/build_teacher_cache.py again"
            )
        return batch._replace(teacher_hidden=hidden)


def open_dynamic_masking(folder: str, shards: ShardSet, seed: int) -> DynamicMasking:
    """Return the dynamic masking for a folder of shards, with the settings they were made with.

    Raises `UserError` when the folder does not hold the tokenizer of its shards.
    """
    tokenizer = shards_tokenizer(folder, shards.manifest)
    if tokenizer is None:
        raise UserError(
            f"--dynamic_masking: {folder} does not hold the tokenizer of the shards; copy it there "
            f"as {TOKENIZER_FOLDER}/, or make the shards again"
        )
    settings = _masking_settings(folder, shards.manifest.arguments)
    return DynamicMasking(settings, MaskingTable(tokenizer, settings.whole_word_mask), seed)


def _masking_settings(folder: str, arguments: JSONObject) -> MaskingSettings:
    import msgspec

    try:
        # An argument of another type would fail later, in the middle of an epoch.
        settings = msgspec.convert(arguments, MaskingSettings)
    except msgspec.ValidationError as error:
        raise UserError(f"--dynamic_masking: the manifest of {folder}: {error}") from None
    return build(MaskingSettings, dataclasses.asdict(settings))


def prefetch(
    make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2
) -> Generator[Made, None, None]:
    """Yield make(item) for each item in order, computed up to `depth` ahead in a thread.

    A thread, not a process: gathering rows from mapped memory is quick, and a fork after MXNet or
    Horovod has started its own threads can hang.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[Made]] = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
