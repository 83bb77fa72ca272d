"""The teacher cache on a cluster: a job stores the rows of one shard."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Optional, Sequence

from bort.cluster import Cluster
from bort.communicator import SingleProcess
from bort.devices import devices_of, resolve_dtype
from bort.encoder import fuse_qkv
from bort.errors import UserError
from bort.files import lock_folder
from bort.jobs import Failures, stopped_by_sigterm
from bort.pretraining.teacher import LiveTeacher, load_teacher
from bort.pretraining.teacher_cache import (
    CacheManifest,
    cache_manifest,
    cache_shard,
    distinct_shards,
    parameters_sha256,
    partial_path,
    prepare_cache,
    rows_path,
    sums_path,
)
from bort.progress import ProgressBar
from bort.types import Block
from data.shards import Shard, ShardEntry, ShardSet


class CacheJob(NamedTuple):
    """What all jobs of a cache share."""

    folder: str  # of the cache
    weights: str  # the teacher's, as for `load_teacher`
    gpus: Optional[str]  # the device numbers of a job
    manifest: CacheManifest
    pad_id: int
    batch_size: int


class ShardToCache(NamedTuple):
    """A shard whose rows are missing."""

    path: str
    entry: ShardEntry

    def __str__(self) -> str:
        return self.path


def build_cache_on(
    cluster: str,
    folder: str,
    sets: Sequence[ShardSet],
    teacher: Block,
    teacher_model: str,
    weights: str,
    dtype: str,
    batch_size: int,
    gpus: Optional[str] = None,
) -> list[ShardEntry]:
    """Do what `build_cache` does, on the workers of the cluster with this address.

    `weights` is what `teacher` was loaded from; each job loads it. `gpus` are the device numbers
    of a job. A shard whose job fails does not keep the others from being stored.
    """
    pairs = distinct_shards(sets)
    manifest = cache_manifest(teacher, teacher_model, sets[0].manifest, dtype)
    pad_id = sets[0].manifest.pad_id
    job = CacheJob(os.path.abspath(folder), weights, gpus, manifest, pad_id, batch_size)
    # SIGTERM cancels the batch jobs, too.
    with lock_folder(folder, "--output_dir"), stopped_by_sigterm():
        with Cluster(cluster, folder, gpus=gpus) as executor:
            prepare_cache(folder, teacher, manifest)
            _cache_missing(executor, job, pairs)
        for _, entry in pairs:  # of machines that were lost
            rows = rows_path(folder, entry)
            for left in (partial_path(rows), sums_path(rows)):
                with suppress(FileNotFoundError):
                    os.remove(left)
    return [entry for _, entry in pairs]


def _cache_missing(
    executor: Cluster, job: CacheJob, pairs: Sequence[tuple[Shard, ShardEntry]]
) -> None:
    """Store the rows of the shards that have none yet, those of the largest first."""
    pairs = sorted(pairs, key=lambda pair: -pair[0].num_sequences)
    missing = [
        ShardToCache(os.path.abspath(shard.path), entry)
        for shard, entry in pairs
        if not os.path.exists(rows_path(job.folder, entry))
    ]
    failures = Failures()
    total = sum(shard.entry.sequences for shard in missing)
    with ProgressBar("caching", total, unit="sequence") as progress:
        stored = executor.as_completed(partial(cache_one, job), missing, on_error=failures.keep)
        for sequences in stored:
            progress.advance(sequences or 0)
    failures.raise_first("shards were not stored", len(missing))


def cache_one(job: CacheJob, shard: ShardToCache) -> int:
    """Store the rows of one shard (a job); return its sequences.

    Raises `UserError` when the teacher that this machine finds is another one.
    """
    manifest = job.manifest
    devices = devices_of(job.gpus, 1, SingleProcess())[:1]
    resolve_dtype(manifest.teacher_dtype, devices, "--teacher_dtype")
    teacher = load_teacher(
        manifest.teacher_model,
        job.weights,
        manifest.vocab_size,
        manifest.tokenizer_fingerprint,
        devices,
    )
    if parameters_sha256(teacher) != manifest.teacher_sha256:
        raise UserError(
            f"--cluster: {job.weights} on {socket.gethostname()} is not the teacher of the driver"
        )
    if manifest.teacher_dtype == "bfloat16":
        LiveTeacher(teacher).use_bfloat16()
    fuse_qkv(teacher.encoder)
    opened = Shard(shard.path)
    arguments = (teacher, manifest, job.pad_id, job.batch_size)
    cache_shard(job.folder, opened, shard.entry, *arguments)
    return opened.num_sequences
