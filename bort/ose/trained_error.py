"""The surrogate error of `bort.ose` on BERT: a short training run with the pretraining loop.

The error of a shape is its held-out cross-entropy, in nats per masked position, after a bounded
number of training steps. By the accounts of the Bort paper it is the cross-entropy with the maximum
point T as teacher: the sum of T's entropy and the divergence of the candidate from T. The rest is
our choice:

- T is a network of the maximum point's shape. Unless its weights are given, it is trained before
  the search by masked language modelling, with BERTAdam in both modes. The temperature is 1, and a
  candidate is trained by the divergence alone, the loss that is measured. T's outputs are stored
  once for all candidates, or given.
- With `--loss divergence` T's entropy is subtracted from the same errors before W is computed: both
  share one journal, and a search with the one repeats no training of the other.
- With `--loss mlm` the error is the masked-LM loss, by which the candidates are then trained.
- The learning rate warms up over the first tenth of the steps and decays to zero.
- T and each candidate are trained in processes of their own with `--threads` OpenMP threads, on
  which the last bits depend: neither the number of workers nor the order changes the table.
- A candidate that exceeds a cap on time or memory has an infinite error; its process is ended.
"""

from __future__ import annotations

import glob
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional, Sequence

import numpy as np

from bort.communicator import SingleProcess
from bort.errors import DivergedError, UserError
from bort.files import read_json_as
from bort.jobs import run as run_in_process
from bort.ose.config import TrainingSettings
from bort.ose.error_bounds import TeacherBounds, teacher_bounds
from bort.pretraining.config import PretrainingSettings, settings_of
from bort.resume import changed_flags
from bort.shapes import Shape, body_shape
from bort.types import Hyperparameters, JSONObject
from data.shards import Manifest, ShardSet, open_shards

WARMUP_RATIO = 0.1
EVALUATION_BATCH = 64
CACHE_BATCH = 64
TEACHER_INTERVAL = 500  # steps between T's checkpoints and evaluations
CANDIDATE = ".candidate-"


class TrainedTeacher(NamedTuple):
    """T with its stored outputs."""

    cache: str  # folder of its outputs
    sha256: str  # of its parameters
    bounds: TeacherBounds  # of the errors


@dataclass(frozen=True)
class TrainedError:
    """The `surrogate_error` of `bort.ose.search.extract` that trains a shape; picklable."""

    settings: TrainingSettings
    folder: str  # for the candidates' runs; each is deleted when it has ended
    teacher: Optional[TrainedTeacher]

    def __call__(
        self, shape: Shape, steps: int, hparams: Hyperparameters, generator: np.random.Generator
    ) -> float:
        """Return the held-out cross-entropy after training, in nats per masked position.

        Infinity when the training has diverged.
        """
        seed = int(generator.integers(2**31))
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=CANDIDATE) as folder:
            run = candidate_run(self.settings, self.teacher, shape, steps, hparams, seed, folder)
            try:
                losses = train(run)
            except DivergedError:
                return math.inf
        if self.teacher is None:
            return losses["mlm_loss"]
        return self.teacher.bounds.entropy + losses["kl"]


def remove_candidates(folder: str) -> None:
    """Remove the folders that candidates of a killed search have left behind."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{CANDIDATE}*")):
        shutil.rmtree(path, ignore_errors=True)


def candidate_run(
    settings: TrainingSettings,
    teacher: Optional[TrainedTeacher],
    shape: Shape,
    steps: int,
    hparams: Hyperparameters,
    seed: int,
    folder: str,
) -> PretrainingSettings:
    """Return the run of the pretraining program that trains a candidate.

    Updates whose gradient is not finite are skipped.
    """
    has_teacher = teacher is not None
    flags = {
        **_data_flags(settings),
        "student_model": shape.name,
        "dropout": settings.dropout,
        "teacher_cache": teacher.cache if teacher else None,
        "mlm_weight": float(not has_teacher),
        "teacher_ce_weight": float(has_teacher),
        "distillation_temperature": 1.0,
        "warmup_ratio": WARMUP_RATIO,
        **hparams,
        "num_steps": steps,
        "on_nonfinite": "skip",
        "ckpt_dir": folder,
        "no_verify": True,  # the search has verified the shards and the cache
        "ckpt_interval": steps,
        "eval_interval": steps,
        "log_interval": steps,
        "seed": seed,
    }
    return settings_of(**flags)


def _data_flags(settings: TrainingSettings) -> JSONObject:
    return {
        "data": str(settings.data),
        "data_eval": settings.data_eval,
        "batch_size": settings.batch_size,
        "batch_size_eval": EVALUATION_BATCH,
        "num_buckets": settings.num_buckets,
        "dtype": settings.dtype,
    }


def train(settings: PretrainingSettings) -> dict[str, float]:
    """Train a candidate without any output on the screen; returns its last held-out metrics."""
    return _finished(settings, quiet=True)[-1]


def _finished(settings: PretrainingSettings, quiet: bool) -> list[dict[str, float]]:
    """Train to the end on the CPU; returns the evaluations."""
    from bort.devices import devices_of
    from bort.pretraining.run import pretraining_loop
    from bort.reporter import FolderReporter

    alone = SingleProcess()
    reporter = FolderReporter(settings.run.ckpt_dir, alone, quiet)
    loop = pretraining_loop(settings, alone, devices_of(None, 1, alone), reporter)
    return loop.run()


def teacher_run(
    settings: TrainingSettings, shape: Shape, seed: int, folder: str
) -> PretrainingSettings:
    """Return the run of the pretraining program that trains T."""
    flags = {
        **_data_flags(settings),
        "student_model": shape.name,
        "dropout": settings.dropout,
        "mlm_weight": 1.0,
        "teacher_ce_weight": 0.0,
        "num_steps": settings.teacher_steps,
        "lr": settings.teacher_lr,
        "warmup_ratio": WARMUP_RATIO,
        "ckpt_dir": folder,
        "ckpt_interval": TEACHER_INTERVAL,
        "eval_interval": TEACHER_INTERVAL,
        "log_interval": TEACHER_INTERVAL,
        "resume": True,
        "seed": seed,
    }
    return settings_of(**flags)


def prepare_teacher(
    settings: TrainingSettings, shape: Shape, seed: int, folder: str
) -> TrainedTeacher:
    """Train T and store its outputs, unless either is given, in a process of its own.

    `folder` gets the run and the cache; an interrupted call is resumed. Raises `UserError` when the
    folder holds a T with other settings, and when the given outputs are not T's.
    """
    return run_in_process(partial(_prepare, settings, shape, seed, folder), settings.threads)


def _prepare(settings: TrainingSettings, shape: Shape, seed: int, folder: str) -> TrainedTeacher:
    from bort.pretraining.run import require_positions

    sets = [open_shards(str(path)) for path in (settings.data, settings.data_eval)]
    require_positions(sets[0], f"--data {settings.data}")
    require_positions(sets[1], f"--data_eval {settings.data_eval}")
    if settings.teacher_cache:
        cache, sha256 = settings.teacher_cache, _checked_cache(settings.teacher_cache, shape)
    else:
        weights = settings.teacher_ckpt_dir or os.path.join(folder, "teacher")
        if not settings.teacher_ckpt_dir:
            train_teacher(teacher_run(settings, shape, seed, weights))
        cache, sha256 = _cached(weights, shape, sets, folder)
    return TrainedTeacher(cache, sha256, teacher_bounds(cache, *sets))


def _checked_cache(cache: str, shape: Shape) -> str:
    """Return the SHA-256 of the weights of a cache's T; raises `UserError` when it is another T."""
    from bort.pretraining.teacher_cache import read_cache_manifest

    manifest = read_cache_manifest(cache)
    if body_shape(manifest.teacher_model) != shape:
        raise UserError(
            f"--teacher_cache {cache}: made with {manifest.teacher_model}, but T is {shape.name}; "
            "name T with --maximum_point"
        )
    return manifest.teacher_sha256


def _cached(weights: str, shape: Shape, sets: Sequence[ShardSet], folder: str) -> tuple[str, str]:
    """Store T's outputs; returns the folder of the cache and the SHA-256 of T's weights."""
    import mxnet as mx

    from bort.pretraining.teacher import load_teacher
    from bort.pretraining.teacher_cache import build_cache, parameters_sha256

    manifest = sets[0].manifest
    network = load_teacher(
        shape.name, weights, manifest.vocab_size, manifest.tokenizer_fingerprint, [mx.cpu()]
    )
    sha256 = parameters_sha256(network)
    cache = os.path.join(folder, f"teacher_cache-{sha256[:16]}")
    build_cache(cache, sets, network, shape.name, dtype="float32", batch_size=CACHE_BATCH)
    return cache, sha256


def train_teacher(run: PretrainingSettings) -> None:
    """Train T, or resume its training.

    Raises `UserError` for a folder of another training, and when it diverges.
    """
    config = os.path.join(run.run.ckpt_dir, "config.json")
    if os.path.exists(config):
        recorded: JSONObject = {}
        for group in read_json_as(config, dict[str, JSONObject]).values():
            recorded.update(group)
        if changed := changed_flags(recorded, run, free=("ckpt_dir",)):
            raise UserError(
                f"{config}: the training of T was started with other settings "
                f"({', '.join(changed)}); give another --output_dir, or "
                f"--teacher_ckpt_dir {run.run.ckpt_dir} to use it as it is"
            )
    try:
        _finished(run, quiet=False)
    except DivergedError:
        raise UserError(
            f"--teacher_lr {run.optimizer.lr}: the training of T in {run.run.ckpt_dir} diverged, "
            "its gradient is not finite; give a lower rate and another --output_dir"
        ) from None


def search_description(
    settings: TrainingSettings, manifests: Sequence[Manifest], teacher: Optional[TrainedTeacher]
) -> JSONObject:
    """Return what an error depends on besides the key of its candidate: see `SearchJournal`."""
    known = known_description(settings, manifests)
    return {**known, "teacher": teacher.sha256 if teacher else None}


def known_description(settings: TrainingSettings, manifests: Sequence[Manifest]) -> JSONObject:
    """Return the part of `search_description` that is known before T is."""
    from bort.pretraining.run import shards_sha256

    names = ["batch_size", "num_buckets", "dropout", "threads", "max_seconds", "max_memory"]
    if settings.dtype != "float32":  # absent from journals of earlier versions
        names.append("dtype")
    return {
        "train": shards_sha256(manifests[0]),
        "held_out": shards_sha256(manifests[1]),
        "loss": "mlm" if settings.loss == "mlm" else "teacher",  # whatever is subtracted
        **{name: getattr(settings, name) for name in names},
    }
