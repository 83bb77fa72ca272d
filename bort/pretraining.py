"""Pretraining: masked language modelling with or without a teacher; the loop and evaluation."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from bort import checkpoint
from bort.bort import (
    decode,
    encode,
    get_bort_model,
    load_parameters,
    masked_hidden,
    parameter_count,
    save_parameters,
)
from bort.communicator import Communicator
from bort.config import as_dict, option, required, write_json
from bort.distillation import (
    correct_predictions,
    distillation_kl,
    distillation_loss,
    masked_lm_loss,
)
from bort.errors import UserError
from bort.optimization import Trainer, learning_rate
from bort.reporting import PhaseTimer, Reporter
from bort.teacher import load_teacher, parameter_file
from data.batches import Batch, BatchOrder, BatchSource, prefetched
from data.shards import Manifest, open_shards


@dataclass(frozen=True)
class DataSettings:
    """What is learnt from, and how it is cut into batches."""

    data: str = required("folder of training shards, made by create_pretraining_data.py")
    data_eval: Optional[str] = option(None, "folder of held-out shards")
    batch_size: int = option(8, "sequences per micro-batch and worker", minimum=1)
    batch_size_eval: int = option(8, "sequences per batch of the evaluation", minimum=1)
    accumulate: int = option(1, "micro-batches per worker and update", minimum=1)
    num_buckets: int = option(10, "sequences are padded to one of so many lengths", minimum=1)
    use_avg_len: bool = option(False, "batch sizes count tokens instead of sequences")


@dataclass(frozen=True)
class StudentSettings:
    """The model that is trained."""

    student_model: str = option(
        "bort_4_8_768_1024", "shape: bort_<layers>_<heads>_<intermediate>_<hidden>"
    )
    student_parameters: Optional[str] = option(None, "start from these weights, not random ones")
    dropout: float = option(0.1, "dropout rate while training", minimum=0.0, maximum=0.99)


@dataclass(frozen=True)
class TeacherSettings:
    """The frozen model that is imitated; without one the loss is masked language modelling only."""

    teacher_model: Optional[str] = option(
        None, "roberta_24_1024_16, roberta_12_768_12, or a shape as for --student_model"
    )
    teacher_ckpt_dir: Optional[str] = option(
        None, "the teacher's weights: a parameter file, a checkpoint, or a run's folder"
    )

    def check(self) -> None:
        """Raise `UserError` when one of the two flags stands without the other."""
        if self.teacher_model and not self.teacher_ckpt_dir:
            raise UserError(
                "--teacher_model needs --teacher_ckpt_dir: an untrained teacher is none"
            )
        if self.teacher_ckpt_dir and not self.teacher_model:
            raise UserError("--teacher_ckpt_dir needs --teacher_model, the shape of those weights")


@dataclass(frozen=True)
class LossSettings:
    """mlm_weight * cross-entropy + teacher_ce_weight * T^2 * KL(teacher / T || student / T)."""

    mlm_weight: float = option(0.1, "weight of the masked-LM cross-entropy", minimum=0.0)
    teacher_ce_weight: float = option(0.5, "weight of the distance from the teacher", minimum=0.0)
    distillation_temperature: float = option(2.0, "T, softens both distributions", minimum=0.01)


@dataclass(frozen=True)
class OptimizerSettings:
    """BERTAdam and its schedule."""

    num_steps: int = option(1000, "updates to make", minimum=1)
    lr: float = option(1e-4, "peak learning rate", minimum=0.0)
    warmup_ratio: float = option(
        0.01, "part of the steps in which the rate rises", minimum=0.0, maximum=1.0
    )
    weight_decay: float = option(0.01, "decoupled decay, not on biases and LayerNorm", minimum=0.0)
    epsilon: float = option(1e-6, "added to the root of the second moment", minimum=0.0)
    max_norm: float = option(1.0, "gradients are clipped to this norm", minimum=1e-9)

    @property
    def warmup_steps(self) -> int:
        """Return the number of steps of the warm-up."""
        return int(self.num_steps * self.warmup_ratio)


@dataclass(frozen=True)
class RunSettings:
    """Where the run goes, what it says, and where it stops and starts."""

    ckpt_dir: str = option("runs/pretraining", "folder of checkpoints and metrics")
    ckpt_interval: int = option(1000, "updates between checkpoints", minimum=1)
    keep_checkpoints: int = option(3, "newest checkpoints to keep, besides the best", minimum=1)
    resume: bool = option(False, "go on from the newest good checkpoint in --ckpt_dir")
    start_step: int = option(
        0, "go on from the checkpoint of this step and delete the later ones", minimum=0
    )
    log_interval: int = option(10, "updates between metric lines", minimum=1)
    eval_interval: int = option(1000, "updates between evaluations", minimum=1)
    seed: int = option(0, "of the weights, the order of the data and the dropout", minimum=0)
    gpus: Optional[str] = option(None, "device numbers such as 0,1; without: the CPU")


class PretrainingSettings(NamedTuple):
    """All settings of a pretraining run, one member per concern."""

    data: DataSettings
    student: StudentSettings
    teacher: TeacherSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    run: RunSettings


SETTINGS_CLASSES = (
    DataSettings,
    StudentSettings,
    TeacherSettings,
    LossSettings,
    OptimizerSettings,
    RunSettings,
)


class DeviceBatch(NamedTuple):
    """A micro-batch as NDArrays on its device (shapes: see data.batches.Batch)."""

    input_ids: Any
    valid_length: Any
    masked_positions: Any
    labels: Any


def to_device(batch: Batch, device: Any) -> DeviceBatch:
    """Copy a micro-batch to a device."""
    arrays = (batch.input_ids, batch.valid_length, batch.masked_positions, batch.labels)
    return DeviceBatch(*(nd.array(array, ctx=device, dtype="float32") for array in arrays))


def masked_logits(model: Any, batch: DeviceBatch) -> Any:
    """Return the logits [n, vocabulary] of a model at the masked positions of a micro-batch."""
    sequence = encode(model, batch.input_ids, batch.valid_length)
    return decode(model, masked_hidden(model, sequence, batch.masked_positions))


def evaluate(
    student: Any,
    teacher: Any | None,
    source: BatchSource,
    temperature: float,
    communicator: Communicator,
    device: Any,
) -> dict[str, float]:
    """Measure a model on every batch of a held-out set, split over the ranks.

    Returns means over all masked positions: mlm_loss (nats), accuracy, and with a teacher
    teacher_accuracy and kl, which is temperature^2 * KL(teacher || student) at the temperature.
    """
    sums = np.zeros(5)
    for number in range(communicator.rank, source.order.batches_per_epoch, communicator.size):
        batch = to_device(source(number), device)
        logits = masked_logits(student, batch)
        parts = [masked_lm_loss(logits, batch.labels).sum()]
        parts.append(correct_predictions(logits, batch.labels))
        if teacher is not None:
            teacher_logits = masked_logits(teacher, batch)
            parts.append(distillation_kl(logits, teacher_logits, temperature).sum())
            parts.append(correct_predictions(teacher_logits, batch.labels))
        values = nd.concat(*parts, dim=0).asnumpy()
        sums[: len(values)] += values
        sums[4] += len(batch.labels)
    mlm, correct, kl, teacher_correct, positions = communicator.sum(sums)
    result = {"mlm_loss": mlm / positions, "accuracy": correct / positions}
    if teacher is not None:
        result.update(kl=kl / positions, teacher_accuracy=teacher_correct / positions)
    return result


class Interval:
    """Sums since the last metric line, kept on the device so that no step waits for them."""

    # total loss, mlm, kl, correct predictions: summed over the masked positions; their number
    SIZE = 5

    def __init__(self, device: Any) -> None:
        self._sums = nd.zeros(self.SIZE, ctx=device)
        self.tokens = 0

    def add(self, sums: Any, tokens: int) -> None:
        """Add the sums [5] of one micro-batch."""
        self._sums += sums.as_in_context(self._sums.context)
        self.tokens += tokens

    def state(self) -> list[float]:
        """Return everything as numbers; waits for the device."""
        return [*map(float, self._sums.asnumpy()), self.tokens]

    def load_state(self, state: Sequence[float]) -> None:
        """Restore what `state` returned."""
        self._sums[:] = nd.array(state[: self.SIZE], ctx=self._sums.context)
        self.tokens = int(state[self.SIZE])


class Stopwatch:
    """Seconds spent training, without the evaluations and checkpoints in between."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap and start the next."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the enclosed work out of the lap; waits for what the device still has to do."""
        nd.waitall()
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class Pretraining:
    """One run: what it trains, from what, and how far it is.

    `step` counts updates made, `position` the micro-batches of the endless stream that all ranks
    together have used. Both, with the parameters and the optimiser's state, are all that a resumed
    run needs (see data.batches).
    """

    def __init__(self, settings: PretrainingSettings, communicator: Communicator) -> None:
        self.settings = settings
        self.communicator = communicator
        self.devices = devices_of(settings.run.gpus, communicator)
        self.step = 0
        self.position = 0
        self.best_loss = float("inf")
        self.best_step: int | None = None
        self.stop_asked = False
        self.source, self.held_out, self.manifest = open_data(settings)
        self.student, self.teacher = build_models(settings, self.manifest, self.devices)
        if settings.data.accumulate > 1:
            self.student.collect_params().setattr("grad_req", "add")
        self.trainer = Trainer(
            list(self.student.collect_params().values()),
            communicator,
            weight_decay=settings.optimizer.weight_decay,
            epsilon=settings.optimizer.epsilon,
            max_norm=settings.optimizer.max_norm,
        )
        self._interval = Interval(self.devices[0])
        self._gradient_norm = nd.zeros(1, ctx=self.devices[0])
        self._stopwatch = Stopwatch()
        self._timer = PhaseTimer()

    def run(self) -> list[dict[str, float]]:
        """Train up to the last step; returns the evaluations, of a new run the first before it."""
        run, last = self.settings.run, self.settings.optimizer.num_steps
        self._begin()
        batches = prefetched(lambda number: (number, self.source(number)), self._numbers())
        # A resumed run has had its evaluation of this step.
        evaluations = [] if self.step else [self._evaluate()]
        self._stopwatch.lap()
        stop = False
        with stop_on_sigterm(self):
            while self.step < last and not stop:
                self._train_step(batches)
                stop = self._stop_agreed()
                if self.step % run.log_interval == 0 or self.step == last:
                    self._log()
                best = False
                if self.step % run.eval_interval == 0 or self.step == last:
                    evaluations.append(self._evaluate())
                    best = self._is_best(evaluations[-1])
                due = self.step % run.ckpt_interval == 0 or self.step == last
                if due or best or stop:
                    self._save(best)
        batches.close()
        self._reporter.close()
        return evaluations

    def _stop_agreed(self) -> bool:
        """Tell whether any rank was asked to stop: all have to leave after the same step."""
        return bool(self.communicator.sum(np.array([float(self.stop_asked)]))[0])

    @property
    def _workers(self) -> int:
        return self.communicator.size * len(self.devices)

    @property
    def _first(self) -> bool:
        return self.communicator.rank == 0

    def _begin(self) -> None:
        folder = self.settings.run.ckpt_dir
        resumed = self._restore()
        parameters = self.student.collect_params().values()
        self.communicator.broadcast([array for p in parameters for array in p.list_data()])
        if resumed:
            self.communicator.broadcast(list(self.trainer.state().values()))
        if self._first:
            os.makedirs(folder, exist_ok=True)
            write_json(os.path.join(folder, "config.json"), as_dict(*self.settings))
        self._reporter = Reporter(
            folder, self.settings.optimizer.num_steps, self.step, enabled=self._first
        )
        self._reporter.say(self._description())

    def _description(self) -> str:
        return (
            f"{self.settings.student.student_model}, "
            f"{parameter_count(self.student):,} parameters; "
            f"{self.manifest.totals['sequences']:,} sequences, "
            f"{self.source.order.batches_per_epoch:,} batches an epoch; "
            f"{self.communicator.size} rank(s) x {len(self.devices)} device(s) x "
            f"{self.settings.data.accumulate} micro-batch(es) an update; "
            f"{os.environ.get('OMP_NUM_THREADS')} OpenMP thread(s) a rank; from step {self.step}"
        )

    def _numbers(self) -> Iterator[int]:
        """Yield the numbers of the micro-batches that fall to this rank, without end."""
        position = self.position
        first = self.communicator.rank * len(self.devices)
        while True:
            for _ in range(self.settings.data.accumulate):
                yield from range(position + first, position + first + len(self.devices))
                position += self._workers

    def _train_step(self, batches: Iterator[tuple[int, Batch]]) -> None:
        optimizer, self._timer.measured = self.settings.optimizer, self._due_to_measure()
        if self.settings.data.accumulate > 1:
            self.trainer.zero_gradients()
        positions = 0
        for _ in range(self.settings.data.accumulate):
            for device in self.devices:
                with self._timer("data"):
                    number, batch = next(batches)
                    on_device = to_device(batch, device)
                self._forward_backward(number, on_device, batch.tokens)
                positions += len(batch.labels)
        with self._timer("communication"):
            total = self.trainer.sum_gradients(positions)
        with self._timer("update"):
            rate = learning_rate(
                self.step + 1, optimizer.lr, optimizer.warmup_steps, optimizer.num_steps
            )
            before, self._gradient_norm = self._gradient_norm, self.trainer.update(total, rate)
        # One step may wait in the device's queue, no more: a run that is told to stop ends soon.
        before.wait_to_read()
        self.step += 1
        self.position += self._workers * self.settings.data.accumulate
        self._reporter.advance()

    def _due_to_measure(self) -> bool:
        return (self.step + 1) % self.settings.run.log_interval == 0

    def _forward_backward(self, number: int, batch: DeviceBatch, tokens: int) -> None:
        loss = self.settings.loss
        teacher_logits = None
        if self.teacher is not None:
            with self._timer("teacher"):
                teacher_logits = masked_logits(self.teacher, batch)
        # Keyed by the micro-batch, so dropout depends neither on ranks nor on interruptions.
        key = np.random.SeedSequence([self.settings.run.seed, number]).generate_state(1)[0]
        mx.random.seed(int(key) & 0x7FFFFFFF, ctx=batch.input_ids.context)
        with self._timer("student"):
            with autograd.record():
                logits = masked_logits(self.student, batch)
                parts = distillation_loss(
                    logits,
                    batch.labels,
                    teacher_logits,
                    loss.mlm_weight,
                    loss.teacher_ce_weight,
                    loss.distillation_temperature,
                )
            parts.total.backward()
            correct = correct_predictions(logits, batch.labels)
            count = nd.full(1, len(batch.labels), ctx=batch.labels.context)
            self._interval.add(nd.concat(*parts, correct, count, dim=0), tokens)

    def _log(self) -> None:
        sums = self.communicator.sum(np.array(self._interval.state()))
        seconds = self._stopwatch.lap()
        total, mlm, kl, correct, positions, tokens = sums
        values = {"loss": total / positions, "mlm_loss": mlm / positions}
        if self.teacher is not None:
            values["kl"] = kl / positions
        values["accuracy"] = correct / positions
        values["lr"] = self.trainer.rate
        values["gradient_norm"] = float(self._gradient_norm.asscalar())
        values["tokens_per_second"] = round(tokens / seconds)
        self._reporter.log(self.step, "train", {**values, **self._timer.shares()})
        self._interval = Interval(self.devices[0])

    def _evaluate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        with self._stopwatch.paused():
            result = evaluate(
                self.student,
                self.teacher,
                self.held_out,
                self.settings.loss.distillation_temperature,
                self.communicator,
                self.devices[0],
            )
        self._reporter.log(self.step, "eval", result)
        return result

    def _is_best(self, evaluation: dict[str, float]) -> bool:
        loss = evaluation.get("mlm_loss", self.best_loss)
        improved = loss < self.best_loss
        if improved:
            self.best_loss, self.best_step = loss, self.step
        return improved

    def _save(self, best: bool) -> None:
        with self._stopwatch.paused():
            interval = self.communicator.sum(np.array(self._interval.state())).tolist()
            if self._first:
                self._write_checkpoint(interval, best)
            self.communicator.barrier()

    def _write_checkpoint(self, interval: list[float], best: bool) -> None:
        run = self.settings.run
        state = {
            "position": self.position,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "interval": interval,
            "model": self.settings.student.student_model,
            "vocab_size": self.manifest.vocab_size,
            "tokenizer_fingerprint": self.manifest.tokenizer_fingerprint,
            "settings": as_dict(*self.settings),
        }
        arrays = {name: array.asnumpy() for name, array in self.trainer.state().items()}
        path = checkpoint.save(
            run.ckpt_dir,
            self.step,
            lambda file: save_parameters(self.student, file),
            arrays,
            state,
        )
        if best:
            checkpoint.point(run.ckpt_dir, checkpoint.BEST, os.path.basename(path))
        checkpoint.prune(run.ckpt_dir, run.keep_checkpoints)
        self._reporter.say(f"step {self.step:>7}  saved {path}")

    def _restore(self) -> bool:
        run = self.settings.run
        if not (run.resume or run.start_step):
            if self._first:
                checkpoint.require_none(run.ckpt_dir)
            return False
        found = None
        if self._first:
            found = (
                checkpoint.at_step(run.ckpt_dir, run.start_step)
                if run.start_step
                else checkpoint.latest(run.ckpt_dir)
            )
        state = self.communicator.broadcast_object(found.state if found else None)
        if state is None:
            return False
        if found:
            load_parameters(self.student, found.model_path)
            self.trainer.load_state(found.trainer_arrays())
            self._interval.load_state(state["interval"])
        self.step, self.position = state["step"], state["position"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        if found:
            checkpoint.rewind(run.ckpt_dir, self.step, self.best_step)
        return True


@contextmanager
def stop_on_sigterm(run: Pretraining) -> Iterator[None]:
    """Let SIGTERM, a cluster's notice before it takes the machine, end the run after its step."""

    def ask(number: int, frame: FrameType | None) -> None:
        run.stop_asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def devices_of(gpus: str | None, communicator: Communicator) -> list[Any]:
    """Return the devices of this process: the CPU, the GPUs named, or under Horovod one of them."""
    if gpus is None:
        return [mx.cpu()]
    numbers = [int(number) for number in gpus.split(",")]
    if communicator.size > 1:
        numbers = [numbers[communicator.local_rank % len(numbers)]]
    return [mx.gpu(number) for number in numbers]


def open_data(settings: PretrainingSettings) -> tuple[BatchSource, BatchSource | None, Manifest]:
    """Open the training and held-out shards; raises `UserError` when their tokenizers differ."""
    data = settings.data
    shards = open_shards(data.data)
    order = BatchOrder(
        shards.lengths, data.batch_size, data.num_buckets, data.use_avg_len, settings.run.seed
    )
    training = BatchSource(shards, order, shards.manifest.pad_id)
    if not data.data_eval:
        return training, None, shards.manifest
    held_out = open_shards(data.data_eval)
    if held_out.manifest.tokenizer_fingerprint != shards.manifest.tokenizer_fingerprint:
        raise UserError(
            f"--data_eval {data.data_eval}: made with another tokenizer than --data {data.data}"
        )
    order = BatchOrder(held_out.lengths, data.batch_size_eval, data.num_buckets, data.use_avg_len)
    return training, BatchSource(held_out, order, shards.manifest.pad_id), shards.manifest


def build_models(
    settings: PretrainingSettings, manifest: Manifest, devices: list[Any]
) -> tuple[Any, Any | None]:
    """Build the student, and the teacher if there is one."""
    mx.random.seed(settings.run.seed)
    student, _ = get_bort_model(
        settings.student.student_model,
        vocab=range(manifest.vocab_size),
        ctx=devices,
        dropout=settings.student.dropout,
    )
    if settings.student.student_parameters:
        load_parameters(student, parameter_file(settings.student.student_parameters))
    student.encoder.hybridize(static_alloc=True)
    if not settings.teacher.teacher_model:
        return student, None
    teacher = load_teacher(
        settings.teacher.teacher_model,
        settings.teacher.teacher_ckpt_dir,
        manifest.vocab_size,
        manifest.tokenizer_fingerprint,
        devices,
    )
    return student, teacher
