r"""Store the teacher's outputs for shards, so that training with --teacher_cache need not run it.

    python scripts/build_teacher_cache.py --data shards/train,shards/test --output_dir cache \
        --teacher_model roberta_24_1024_16 --teacher_ckpt_dir model/roberta.params

An interrupted build resumes when the same command runs again. Under horovodrun
the ranks share the shards, with --cluster the workers of a Dask cluster do.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.cluster import ClusterSettings
from bort.communicator import communicator_of_environment
from bort.config import option, parse, required
from bort.errors import UserError, entry_point
from bort.files import listed_names, require_writable
from data.shards import ShardEntry, ShardSet, open_shards


@dataclass(frozen=True)
class CacheSettings:
    """Teacher, shards and cache."""

    data: str = required("folders of shards, separated by commas (\\, is a comma in a name)")
    output_dir: str = required("folder of the cache")
    teacher_model: str = required("roberta_24_1024_16, roberta_12_768_12, or bort_<...>")
    teacher_ckpt_dir: str = required("its weights: a parameter file, a checkpoint, a run's folder")
    teacher_dtype: str = option(
        "float32",
        "precision of the teacher's matrix products: float32, or on CPUs with AVX512-BF16 or AMX "
        "bfloat16",
        choices=("float32", "bfloat16"),
    )
    dtype: str = option("float16", "type of the stored rows", choices=("float16", "float32"))
    batch_size: int = option(16, "sequences per forward pass", minimum=1)
    gpus: Optional[str] = option(None, "GPU number (default: the CPU)")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Build the cache; returns its size in bytes."""
    settings, machines = parse(str(__doc__), argv, CacheSettings, ClusterSettings)
    # After the flags: --help does not import MXNet.
    from bort.devices import devices_of, resolve_dtype
    from bort.pretraining.cache_jobs import build_cache_on
    from bort.pretraining.run import held_out_source
    from bort.pretraining.teacher import LiveTeacher, load_teacher, round_teacher
    from bort.pretraining.teacher_cache import build_cache

    start = time.perf_counter()
    require_writable(settings.output_dir, "--output_dir")
    communicator = communicator_of_environment()
    sets = _shards(settings.data)
    if machines.cluster and communicator.size > 1:
        raise UserError("--cluster: horovodrun spreads the shards over its ranks; leave it out")
    gpus = None if machines.cluster else settings.gpus
    devices = devices_of(gpus, 1, communicator)[:1]
    resolve_dtype(settings.teacher_dtype, devices, "--teacher_dtype")
    teacher = load_teacher(
        settings.teacher_model,
        settings.teacher_ckpt_dir,
        sets[0].manifest.vocab_size,
        sets[0].manifest.tokenizer_fingerprint,
        devices,
    )
    if settings.teacher_dtype == "bfloat16":
        source = held_out_source(sets[0], settings.batch_size, num_buckets=1)
        cost = round_teacher(LiveTeacher(teacher), source, devices[0])
        if communicator.rank == 0:
            print(cost)
    what = (settings.output_dir, sets, teacher, settings.teacher_model)
    if machines.cluster:
        how = (settings.teacher_ckpt_dir, settings.dtype, settings.batch_size, settings.gpus)
        entries = build_cache_on(machines.cluster, *what, *how)
    else:
        entries = build_cache(*what, settings.dtype, settings.batch_size, communicator)
    return _report(settings.output_dir, entries, communicator.rank, time.perf_counter() - start)


def _shards(folders: str) -> list[ShardSet]:
    from bort.pretraining.run import require_positions

    names = listed_names(folders)
    if not all(names):
        raise UserError(f"--data {folders}: has an empty name; give folders separated by commas")
    if len(names) > 1 and os.path.exists(folders):
        raise UserError(f"--data {folders}: write \\, for a comma in the name of a folder")
    sets = [open_shards(folder) for folder in names]
    for name, one in zip(names, sets):
        require_positions(one, f"--data {name}")
        if one.manifest.tokenizer_fingerprint != sets[0].manifest.tokenizer_fingerprint:
            raise UserError(f"--data {name}: made with another tokenizer than {names[0]}")
    return sets


def _report(folder: str, entries: list[ShardEntry], rank: int, seconds: float) -> int:
    from bort.pretraining.teacher_cache import rows_path

    size = sum(os.path.getsize(rows_path(folder, entry)) for entry in entries)
    sequences = sum(entry.sequences for entry in entries)
    if rank == 0:
        print(
            f"{folder}: {size / 1e6:,.1f} MB for {sequences:,} sequences, "
            f"{size / sequences / 1e3:,.1f} MB per 1,000; {seconds:,.1f} s"
        )
    return size


if __name__ == "__main__":
    main()
