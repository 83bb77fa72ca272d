"""The surrogate error of `bort.ose` on BERT: a short training by the project's pretraining loop.

The error of a shape is its held-out cross-entropy, in nats per masked position, after a bounded
number of updates. By the accounts of the Bort paper it is the cross-entropy with the maximum point
T, which acts as teacher: the sum of T's entropy and the divergence of the candidate from T. What
follows is ours:

- T is a network of the maximum point's shape, trained before the search by masked language
  modelling, with BERTAdam in both modes, unless its weights are given. The temperature is 1, and a
  candidate is trained by the divergence alone, the loss that is measured. T's outputs are stored
  once for all candidates.
- With `--loss mlm` the error is the masked-LM loss, by which the candidates are then trained.
- The rate rises in the first tenth of the steps and falls to zero.
- T and each candidate are trained in processes of their own with `--threads` OpenMP threads, on
  which the last bits depend: neither the number of workers nor the order changes the table.
- A candidate that breaks a cap on time or memory has an infinite error, and its process ends.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np

from bort.communicator import SingleProcess
from bort.config import as_dict, check_limits, option
from bort.errors import UserError
from bort.files import read_json
from bort.jobs import Caps, OverMemoryError, OverTimeError, run_isolated
from bort.ose.search import MODES, CapError, hyperparameter_sets
from bort.pretraining.config import OptimizerSettings, PretrainingSettings, settings_of
from bort.shapes import Shape
from bort.types import Hyperparameters
from data.shards import Manifest, ShardSet, open_shards

# The peak rates where none is given: SGD's gradients are clipped to norm 1, so its steps are small.
RATES = {"theory": 0.5, "practical": 1e-3}
WARMUP_RATIO = 0.1
EVALUATION_BATCH = 64
CACHE_BATCH = 64
TEACHER_INTERVAL = 500  # updates between T's checkpoints and evaluations
CANDIDATE = ".candidate-"


@dataclass(frozen=True)
class TrainingSettings:
    """How the error is measured when it is not known: by training every candidate on --data."""

    data: Optional[str] = option(None, "folder of training shards, by create_pretraining_data.py")
    data_eval: Optional[str] = option(
        None, "folder of held-out shards, where the error is measured"
    )
    loss: str = option(
        "teacher",
        "the error: cross-entropy with T as teacher, or plain masked-LM loss",
        choices=("teacher", "mlm"),
    )
    steps: int = option(200, "updates of each candidate", minimum=1)
    repeats: int = option(1, "trainings of each candidate, whose errors are averaged", minimum=1)
    mode: str = option(
        "practical",
        "practical: BERTAdam; theory: SGD, the weights clipped to [-1, 1]",
        choices=tuple(MODES),
    )
    grid: Optional[str] = option(
        None,
        'hyper-parameters to combine, as in "lr=5e-4,1e-3 weight_decay=0,0.01": any number among '
        "the pretraining program's optimiser settings (without: lr=1e-3, in theory mode lr=0.5)",
    )
    batch_size: int = option(16, "sequences per update", minimum=1)
    num_buckets: int = option(2, "ranges of length; a batch is made within one", minimum=1)
    dropout: float = option(0.1, "dropout rate while training", minimum=0.0, maximum=0.99)
    teacher_ckpt_dir: Optional[str] = option(
        None, "T's weights: a parameter file, a checkpoint, or a run's folder; else T is trained"
    )
    teacher_steps: int = option(2000, "updates of T", minimum=1)
    teacher_lr: float = option(5e-4, "peak learning rate of T", minimum=0.0)
    workers: Optional[int] = option(
        None, "candidates trained at once (without: as many as the cores allow)", minimum=1
    )
    threads: int = option(1, "OpenMP threads of a candidate", minimum=1)
    max_seconds: Optional[float] = option(
        None, "a candidate that takes longer has an infinite error", minimum=0.0
    )
    max_memory: Optional[float] = option(
        None, "a candidate that takes more megabytes has an infinite error", minimum=0.0
    )

    def check(self) -> None:
        """Raise `UserError` when there are shards of one kind only, or no such hyper-parameter."""
        if bool(self.data) != bool(self.data_eval):
            raise UserError("--data and --data_eval go together: one trains, one measures")
        if self.loss == "mlm" and self.teacher_ckpt_dir:
            raise UserError("--teacher_ckpt_dir: --loss mlm asks no teacher; leave one of them out")
        self.thetas()

    def thetas(self) -> list[dict[str, Any]]:
        """Return the sets of hyper-parameters, of which each is fit for `OptimizerSettings`."""
        values = read_grid(self.grid) if self.grid else {}
        sets = hyperparameter_sets(self.mode, **{"lr": [RATES[self.mode]], **values})
        for theta in sets:
            check_limits(replace(OptimizerSettings(), **theta))
        return sets


def read_grid(text: str) -> dict[str, list[float]]:
    """Return the values of each hyper-parameter of `name=value,value name=value`.

    Raises `UserError` for another form, and for a name that is no number of `OptimizerSettings`.
    """
    known = [one.name for one in fields(OptimizerSettings) if one.type == "float"]
    grid: dict[str, list[float]] = {}
    for part in text.split():
        name, _, values = part.partition("=")
        if name not in known:
            raise UserError(f"--grid {part}: must name one of {', '.join(known)}")
        try:
            grid[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--grid {part}: must be numbers, as in lr=5e-4,1e-3") from None
    return grid


class Teacher(NamedTuple):
    """T, ready to be imitated."""

    cache: str  # folder of its outputs
    sha256: str  # of its parameters
    entropy: float  # on the held-out shards, nats per masked position


@dataclass(frozen=True)
class TrainedError:
    """The `surrogate_error` of `bort.ose.search.extract` that trains a shape; picklable."""

    settings: TrainingSettings
    folder: str  # where candidates have their runs; each is deleted when it has ended
    teacher: Optional[Teacher]

    def __call__(
        self, shape: Shape, steps: int, theta: Hyperparameters, generator: np.random.Generator
    ) -> float:
        """Return the held-out cross-entropy after training, in nats per masked position.

        Raises `CapError` when a cap is broken.
        """
        seed = int(generator.integers(2**31))
        caps = Caps(self.settings.max_seconds, self.settings.max_memory)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=CANDIDATE) as folder:
            run = candidate_run(self.settings, self.teacher, shape, steps, theta, seed, folder)
            try:
                figures = run_isolated(partial(train, run), self.settings.threads, caps)
            except OverTimeError:
                raise CapError("time cap") from None
            except OverMemoryError:
                raise CapError("memory cap") from None
        if self.teacher is None:
            return figures["mlm_loss"]
        return self.teacher.entropy + figures["kl"]


def remove_candidates(folder: str) -> None:
    """Remove what the candidates of a killed search have left."""
    for left in glob.glob(os.path.join(glob.escape(folder), f"{CANDIDATE}*")):
        shutil.rmtree(left, ignore_errors=True)


def candidate_run(
    settings: TrainingSettings,
    teacher: Optional[Teacher],
    shape: Shape,
    steps: int,
    theta: Hyperparameters,
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
        **theta,
        "num_steps": steps,
        "on_nonfinite": "skip",
        "ckpt_dir": folder,
        "ckpt_interval": steps,
        "eval_interval": steps,
        "log_interval": steps,
        "seed": seed,
    }
    return settings_of(**flags)


def _data_flags(settings: TrainingSettings) -> dict[str, Any]:
    return {
        "data": str(settings.data),
        "data_eval": settings.data_eval,
        "batch_size": settings.batch_size,
        "batch_size_eval": EVALUATION_BATCH,
        "num_buckets": settings.num_buckets,
    }


def train(settings: PretrainingSettings) -> dict[str, float]:
    """Train a candidate without any output on the screen; returns its last held-out metrics."""
    return _finished(settings, quiet=True)[-1]


def _finished(settings: PretrainingSettings, quiet: bool) -> list[dict[str, float]]:
    """Train to the end on the CPU; returns the evaluations."""
    from bort.devices import devices_of
    from bort.pretraining.run import pretraining_loop
    from bort.training.reporting import FolderReporter

    alone = SingleProcess()
    reporter = FolderReporter(settings.run.ckpt_dir, alone, quiet)
    loop = pretraining_loop(settings, alone, devices_of(None, 1, alone), reporter)
    evaluations = loop.run()
    if not loop.finished():
        raise UserError("interrupted; rerun the same command to resume")
    return evaluations


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


def prepare_teacher(settings: TrainingSettings, shape: Shape, seed: int, folder: str) -> Teacher:
    """Train T, unless its weights are given, and store its outputs, in a process of its own.

    `folder` gets the run and the cache; an interrupted call goes on where it stopped. Raises
    `UserError` when the folder holds a T of other settings.
    """
    return run_isolated(partial(_prepare, settings, shape, seed, folder), settings.threads)


def _prepare(settings: TrainingSettings, shape: Shape, seed: int, folder: str) -> Teacher:
    import mxnet as mx

    from bort.pretraining.teacher import load_teacher
    from bort.pretraining.teacher_cache import build_cache, parameters_sha256

    weights = settings.teacher_ckpt_dir or os.path.join(folder, "teacher")
    if not settings.teacher_ckpt_dir:
        _train_teacher(teacher_run(settings, shape, seed, weights))
    training, held_out = (open_shards(str(path)) for path in (settings.data, settings.data_eval))
    manifest = training.manifest
    network = load_teacher(
        shape.name, weights, manifest.vocab_size, manifest.tokenizer_fingerprint, [mx.cpu()]
    )
    sha256 = parameters_sha256(network)
    cache = os.path.join(folder, f"teacher_cache-{sha256[:16]}")
    sets = [training, held_out]
    build_cache(cache, sets, network, shape.name, dtype="float32", batch_size=CACHE_BATCH)
    return Teacher(cache, sha256, held_out_entropy(held_out, cache, settings.num_buckets))


def _train_teacher(run: PretrainingSettings) -> None:
    config = os.path.join(run.run.ckpt_dir, "config.json")
    if os.path.exists(config) and read_json(config) != as_dict(*run):
        raise UserError(
            f"{config}: T was begun with other settings; give another --output_dir, or "
            f"--teacher_ckpt_dir {run.run.ckpt_dir} to take it as it is"
        )
    _finished(run, quiet=False)


def held_out_entropy(shards: ShardSet, cache: str, num_buckets: int) -> float:
    """Return the mean entropy of T's distributions at the masked positions of shards, in nats."""
    import mxnet as mx
    from mxnet import nd

    from bort.pretraining.mlm import to_device
    from bort.pretraining.run import held_out_source
    from bort.pretraining.teacher_cache import CachedTeacher

    teacher = CachedTeacher(cache, [mx.cpu()])
    source = held_out_source(shards, EVALUATION_BATCH, num_buckets, teacher_cache=cache)
    total, positions = 0.0, 0
    for number in range(source.batches_per_epoch):
        batch = to_device(source(number), mx.cpu())
        log = nd.log_softmax(teacher.logits(batch), axis=-1)
        total -= float((nd.exp(log) * log).sum().asscalar())
        positions += len(batch.labels)
    return total / positions


def describe(
    settings: TrainingSettings, manifests: Sequence[Manifest], teacher: Optional[Teacher]
) -> dict[str, Any]:
    """Return all that an error depends on besides what names the candidate: see `ose.Journal`."""
    from bort.pretraining.run import shards_sha256

    names = ("loss", "batch_size", "num_buckets", "dropout", "threads", "max_seconds", "max_memory")
    return {
        "train": shards_sha256(manifests[0]),
        "held_out": shards_sha256(manifests[1]),
        "teacher": teacher.sha256 if teacher else None,
        **{name: getattr(settings, name) for name in names},
    }
