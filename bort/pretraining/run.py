"""Pretraining: masked language modelling, with or without a teacher."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import mxnet as mx
from mxnet import autograd, nd

from bort.bort import EmbeddingRows, get_bort_model
from bort.communicator import Communicator
from bort.config import as_dict, command_of
from bort.devices import devices_of
from bort.errors import UserError
from bort.parameters import load_parameters, parameter_file
from bort.pretraining.config import PretrainingSettings
from bort.pretraining.distillation import correct_predictions, distillation_loss, squared_distance
from bort.pretraining.evaluation import evaluate
from bort.pretraining.mlm import DeviceBatch, masked_logits, to_device
from bort.pretraining.teacher import LiveTeacher, Teacher, load_teacher
from bort.pretraining.teacher_cache import CachedTeacher, open_rows
from bort.saved_model import ModelConfig, save_model
from bort.tokenization import TOKENIZER_FOLDER, load_tokenizer_folder
from bort.training.loop import Training
from bort.training.optimization import learning_rate
from data.batches import Batch, BucketSampler, PretrainingLoader
from data.shards import Manifest, ShardSet, open_shards

# What the micro-batch of a number depends on, besides the shards.
STREAM_FLAGS = {
    "DataSettings": ("batch_size", "num_buckets", "use_avg_len"),
    "RunSettings": ("seed",),
}
# What a metric line is made of, summed over masked positions.
SUMS = ("loss", "mlm_loss", "kl", "accuracy", "teacher_mse")


class Pretraining(Training):
    """One run of pretraining: the student, its teacher if it has one, shards and held-out shards.

    How far it is, is what `Training` counts.
    """

    def __init__(self, settings: PretrainingSettings, communicator: Communicator) -> None:
        run = settings.run
        devices = devices_of(run.gpus, run.cpu_contexts, communicator)
        source, self.held_out, self.manifest = open_data(settings)
        student = build_student(settings, self.manifest, devices)
        self.teacher = build_teacher(settings, self.manifest, devices)
        super().__init__(
            settings,
            communicator,
            devices,
            student,
            source,
            accumulate=settings.data.accumulate,
            last_step=settings.optimizer.num_steps,
            sums=SUMS,
            weight_bound=settings.optimizer.sgd_bound,
        )

    @property
    def student(self) -> Any:
        """Return the network that is trained."""
        return self.network

    @property
    def folder(self) -> str:
        """Return the folder of checkpoints and metrics."""
        return self.settings.run.ckpt_dir

    def _subject(self) -> str:
        return (
            f"{self.settings.student.student_model} on "
            f"{self.manifest.totals['sequences']:,} sequences"
        )

    def _to_device(self, batch: Batch, device: Any) -> DeviceBatch:
        return to_device(batch, device)

    def _rate(self) -> float:
        optimizer = self.settings.optimizer
        return learning_rate(
            self.step + 1, optimizer.lr, optimizer.warmup_steps, optimizer.num_steps
        )

    def _forward_backward(self, number: int, batch: DeviceBatch, tokens: int) -> None:
        settings = self.settings.loss
        teacher_logits = None
        if self.teacher is not None:
            with self._timer("teacher"):
                teacher_logits = self.teacher.logits(batch)
        self._seed_dropout(number, batch.labels.context)
        with self._timer("student"):
            rows = EmbeddingRows(self.student, batch.input_ids)
            with autograd.record():
                logits = masked_logits(self.student, batch, rows)
            *sums, gradient = distillation_loss(
                logits,
                batch.labels,
                teacher_logits,
                settings.mlm_weight,
                settings.teacher_ce_weight,
                settings.distillation_temperature,
            )
            rows.backward(logits, self._scaled(gradient))
            correct = correct_predictions(logits, batch.labels)
            square = nd.zeros_like(correct)
            if settings.log_teacher_mse and teacher_logits is not None:
                square = squared_distance(logits, teacher_logits).sum()
            self._interval.add(nd.concat(*sums, correct, square, dim=0), len(batch.labels), tokens)

    def _figures(self, means: dict[str, float]) -> dict[str, float]:
        shown = dict(means)
        if self.teacher is None:
            del shown["kl"]
        if not self.settings.loss.log_teacher_mse:
            del shown["teacher_mse"]
        return shown

    def _evaluation(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        return evaluate(
            self.student,
            self.teacher,
            self.held_out,
            self.settings.loss.distillation_temperature,
            self.communicator,
            self.devices[0],
        )

    def _evaluation_due(self) -> bool:
        return self.step % self.settings.run.eval_interval == 0 or self.step == self.last_step

    def _checkpoint_due(self, best: bool) -> bool:
        due = self.step % self.settings.run.ckpt_interval == 0
        return due or best or self.step == self.last_step

    def _score(self, evaluation: dict[str, float]) -> float:
        return -evaluation["mlm_loss"]

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.settings.student.student_model,
            "vocab_size": self.manifest.vocab_size,
            "tokenizer_fingerprint": self.manifest.tokenizer_fingerprint,
            "shards_sha256": shards_sha256(self.manifest),
        }

    def _write_model(self, path: str) -> None:
        model_config = ModelConfig(
            model=self.settings.student.student_model,
            vocab_size=self.manifest.vocab_size,
            tokenizer_fingerprint=self.manifest.tokenizer_fingerprint,
            kind="masked_lm",
            max_len=self.student.encoder._max_length,
            details=self._details(),
        )
        tokenizer = os.path.join(self.settings.data.data, TOKENIZER_FOLDER)
        save_model(path, self.student, model_config, load_tokenizer_folder(tokenizer))

    def _details(self) -> dict[str, Any]:
        command = command_of("run_pretraining_distillation.py", *self.settings)
        details = {"step": self.step, "data": self.settings.data.data, "command": command}
        if self.best_step is not None:
            details["metrics"] = {"lowest held-out mlm_loss": -self.best_score}
        return details

    def _require_same_stream(self, state: dict[str, Any]) -> None:
        require_same_stream(self.settings, self.manifest, state)


def require_same_stream(
    settings: PretrainingSettings, manifest: Manifest, state: dict[str, Any]
) -> None:
    """Raise `UserError` when the micro-batches are not those that a checkpoint's state counts."""
    cure = "give what it was made with, or start anew from its weights with --student_parameters"
    if shards_sha256(manifest) != state["shards_sha256"]:
        raise UserError(f"--data {settings.data.data}: not the checkpoint's shards; {cure}")
    now = as_dict(*settings)
    for concern, flags in STREAM_FLAGS.items():
        for flag in flags:
            given, made_with = now[concern][flag], state["settings"][concern][flag]
            if given != made_with:
                raise UserError(
                    f"--{flag} {given}: the checkpoint was made with {made_with}; {cure}"
                )


def shards_sha256(manifest: Manifest) -> str:
    """Return one SHA-256 over those of all shards."""
    return hashlib.sha256(" ".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()


def open_data(
    settings: PretrainingSettings,
) -> tuple[PretrainingLoader, PretrainingLoader | None, Manifest]:
    """Open the training and held-out shards; raises `UserError` when their tokenizers differ."""
    data = settings.data
    shards = open_shards(data.data)
    order = BucketSampler(
        shards.lengths, data.batch_size, data.num_buckets, data.use_avg_len, settings.run.seed
    )
    training = _source(shards, order, settings.teacher.teacher_cache)
    if not data.data_eval:
        return training, None, shards.manifest
    held_out = open_shards(data.data_eval)
    if held_out.manifest.tokenizer_fingerprint != shards.manifest.tokenizer_fingerprint:
        raise UserError(
            f"--data_eval {data.data_eval}: made with another tokenizer than --data {data.data}"
        )
    order = BucketSampler(
        held_out.lengths, data.batch_size_eval, data.num_buckets, data.use_avg_len
    )
    return training, _source(held_out, order, settings.teacher.teacher_cache), shards.manifest


def _source(shards: ShardSet, order: BucketSampler, teacher_cache: str | None) -> PretrainingLoader:
    rows = open_rows(teacher_cache, shards) if teacher_cache else None
    return PretrainingLoader(shards, order, shards.manifest.pad_id, rows)


def build_student(settings: PretrainingSettings, manifest: Manifest, devices: list[Any]) -> Any:
    """Build the model that is trained, from random weights or those it is to start from."""
    mx.random.seed(settings.run.seed)
    student, _ = get_bort_model(
        settings.student.student_model,
        vocab=range(manifest.vocab_size),
        ctx=devices,
        dropout=settings.student.dropout,
    )
    if settings.student.student_parameters:
        load_parameters(student, parameter_file(settings.student.student_parameters))
    student.cast(settings.optimizer.dtype)
    student.encoder.hybridize(static_alloc=True)
    return student


def build_teacher(
    settings: PretrainingSettings, manifest: Manifest, devices: list[Any]
) -> Teacher | None:
    """Load the teacher, or open the cache of one; None when there is neither."""
    teacher = settings.teacher
    if teacher.teacher_cache:
        return CachedTeacher(teacher.teacher_cache, devices)
    if not (teacher.teacher_model and teacher.teacher_ckpt_dir):
        return None
    network = load_teacher(
        teacher.teacher_model,
        teacher.teacher_ckpt_dir,
        manifest.vocab_size,
        manifest.tokenizer_fingerprint,
        devices,
    )
    network.cast(settings.optimizer.dtype)
    return LiveTeacher(network)
