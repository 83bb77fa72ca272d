"""The pretraining loop: masked language modelling, with or without a teacher, in one or many
processes, on one or many devices, interrupted or not.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, Callable, Generator, Iterator, NamedTuple

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from bort import checkpoint
from bort.bort import (
    EmbeddingRows,
    get_bort_model,
    load_parameters,
    parameter_count,
    save_parameters,
)
from bort.communicator import Communicator
from bort.config import as_dict, write_json
from bort.distillation import correct_predictions, distillation_loss, squared_distance
from bort.errors import UserError
from bort.evaluation import DeviceBatch, LiveTeacher, Teacher, evaluate, masked_logits, to_device
from bort.optimization import LossScale, Trainer, learning_rate
from bort.reporting import Interval, PhaseTimer, Reporter, Stopwatch
from bort.settings import PretrainingSettings
from bort.teacher import load_teacher, parameter_file
from bort.teacher_cache import CachedTeacher, open_rows
from data.batches import Batch, BatchOrder, BatchSource, prefetched
from data.shards import Manifest, ShardSet, open_shards

MASK_31_BITS = 0x7FFFFFFF
# What the micro-batch of a number depends on, besides the shards.
STREAM_FLAGS = {
    "DataSettings": ("batch_size", "num_buckets", "use_avg_len"),
    "RunSettings": ("seed",),
}


class MicroBatch(NamedTuple):
    """A batch, its number in the endless stream, and the device of this process it goes to."""

    number: int
    device: Any
    batch: Batch


class Update(NamedTuple):
    """An update that the devices may still be working on."""

    step: int
    position: int
    norm: Any  # of the gradient, NDArray [1]


class Pretraining:
    """One run: what it trains, from what, and how far it is.

    `step` counts updates made, `position` the micro-batches of the endless stream that all ranks
    together have used. Both, with the parameters and the optimiser's state, are all that a resumed
    run needs (see data.batches). An update takes `micro_batches` of them, whatever the number of
    ranks and devices they are shared out to.
    """

    def __init__(self, settings: PretrainingSettings, communicator: Communicator) -> None:
        self.settings = settings
        self.communicator = communicator
        self.devices = devices_of(settings.run.gpus, settings.run.cpu_contexts, communicator)
        self.step = 0
        self.position = 0
        self.micro_batches = settings.data.accumulate * self._workers
        self.best_loss = float("inf")
        self.best_step: int | None = None
        self.stop_asked = False
        self.source, self.held_out, self.manifest = open_data(settings)
        self.student = build_student(settings, self.manifest, self.devices)
        self.teacher = build_teacher(settings, self.manifest, self.devices)
        self.trainer = Trainer(
            list(self.student.collect_params().values()),
            communicator,
            weight_decay=settings.optimizer.weight_decay,
            epsilon=settings.optimizer.epsilon,
            max_norm=settings.optimizer.max_norm,
            loss_scale=LossScale() if settings.optimizer.dtype == "float16" else None,
            compression=settings.optimizer.compression,
        )
        self._interval = Interval(self.devices[0])
        self._update: Update | None = None
        self._unsettled: list[Update] = []
        self._stopwatch = Stopwatch()
        self._timer = PhaseTimer()

    def run(self) -> list[dict[str, float]]:
        """Train up to the last step; returns the evaluations, of a new run the first before it."""
        self.begin()
        return self.train()

    def begin(self) -> None:
        """Restore a checkpoint if one is asked for, make all ranks equal, open the log."""
        self.restore()
        self.synchronise()
        self.enter()

    def restore(self) -> None:
        """Load the checkpoint that is asked for on rank 0, from which the other ranks get it."""
        found = self._wanted_checkpoint() if self._first else None
        if found is None:
            return
        require_same_stream(self.settings, self.manifest, found.state)
        load_parameters(self.student, found.model_path)
        self.trainer.load_state(found.trainer_arrays())
        self.set_progress(found.state)
        checkpoint.rewind(self.settings.run.ckpt_dir, self.step, self.best_step)

    def synchronise(self) -> None:
        """Give every rank the progress, the parameters and the optimiser's state of rank 0."""
        self.set_progress(self.communicator.broadcast_object(self.progress()))
        self.communicator.broadcast(self.arrays())

    def enter(self) -> None:
        """Share out the micro-batches to the ranks there are, and open the log on rank 0.

        Raises `UserError` when there are more workers than micro-batches in an update.
        """
        folder = self.settings.run.ckpt_dir
        if self.micro_batches < self._workers:
            raise UserError(
                f"an update of this run takes {self.micro_batches} micro-batches, "
                f"too few for {self._workers} workers; start fewer"
            )
        gradients = "add" if self._accumulates else "write"
        self.student.collect_params().setattr("grad_req", gradients)
        if self._first:
            os.makedirs(folder, exist_ok=True)
            write_json(os.path.join(folder, "config.json"), as_dict(*self.settings))
        self._reporter = Reporter(
            folder, self.settings.optimizer.num_steps, self.step, enabled=self._first
        )
        self._reporter.say(self._description())

    def train(self, commit: Callable[[], None] | None = None) -> list[dict[str, float]]:
        """Train from where `enter` left the run up to the last step; returns the evaluations.

        `commit` is called between two steps, after each metric line: a moment when the sums of the
        interval are empty.
        """
        run, last = self.settings.run, self.settings.optimizer.num_steps
        with closing(self.batches()) as batches, self._reporter, stop_on_sigterm(self):
            # A resumed run has had its evaluation of this step.
            evaluations = [] if self.step else [self._evaluate()]
            self._stopwatch.lap()
            stop = False
            while self.step < last and not stop:
                if commit and self.step % run.log_interval == 0:
                    commit()
                self.train_step(batches)
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
        return evaluations

    def progress(self) -> dict[str, Any]:
        """Return how far the run is as plain data; `interval` counts this rank's part only."""
        scale = self.trainer.loss_scale
        return {
            "step": self.step,
            "position": self.position,
            "micro_batches": self.micro_batches,
            "loss_scale": [scale.value, scale.good_updates] if scale else None,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "interval": self._interval.state(),
        }

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Go to where the `progress` of rank 0 says; the other ranks' intervals start empty."""
        self.step, self.position = progress["step"], progress["position"]
        self.micro_batches = progress["micro_batches"]
        self.best_loss, self.best_step = progress["best_loss"], progress["best_step"]
        scale = self.trainer.loss_scale
        if scale and progress["loss_scale"]:
            scale.value, scale.good_updates = progress["loss_scale"]
        self._interval = Interval(self.devices[0])
        if self._first:
            self._interval.load_state(progress["interval"])
        self._update, self._unsettled = None, []

    def arrays(self) -> list[Any]:
        """Return all that an update changes: parameters on each device, optimiser's state."""
        parameters = self.student.collect_params().values()
        return [a for p in parameters for a in p.list_data()] + list(self.trainer.state().values())

    def batches(self) -> Generator[MicroBatch, None, None]:
        """Yield the micro-batches that fall to this rank, without end, prepared ahead."""
        return prefetched(
            lambda place: MicroBatch(place[0], place[1], self.source(place[0])), self._places()
        )

    def train_step(self, batches: Iterator[MicroBatch]) -> None:
        """Make one update from the next micro-batches."""
        self._timer.measured = (self.step + 1) % self.settings.run.log_interval == 0
        if self._accumulates:
            self.trainer.zero_gradients()
        positions = 0
        for _ in range(self._share):
            with self._timer("data"):
                number, device, batch = next(batches)
                on_device = to_device(batch, device)
            self._forward_backward(number, on_device, batch.tokens)
            positions += len(batch.labels)
        with self._timer("communication"):
            total = self.trainer.sum_gradients(positions)
        with self._timer("update"):
            norm = self.trainer.update(total, self._rate())
        self.step += 1
        self._update = Update(self.step, self.position, norm)
        self._unsettled.append(self._update)
        self.position += self.micro_batches
        # One step may wait in the device's queue, no more: a run that is told to stop ends soon.
        self._settle(waiting=0 if self.trainer.loss_scale else 1)
        self._reporter.advance()

    @property
    def _workers(self) -> int:
        return self.communicator.size * len(self.devices)

    @property
    def _first(self) -> bool:
        return self.communicator.rank == 0

    @property
    def _accumulates(self) -> bool:
        return self.micro_batches > self._workers

    @property
    def _share(self) -> int:
        """Return how many micro-batches of an update fall to this rank."""
        places = range(self.micro_batches)
        return sum(
            place % self._workers // len(self.devices) == self.communicator.rank for place in places
        )

    def _places(self) -> Iterator[tuple[int, Any]]:
        """Yield (number, device) of this rank's micro-batches: worker w has w, w + workers, ..."""
        position = self.position
        while True:
            for place in range(self.micro_batches):
                rank, device = divmod(place % self._workers, len(self.devices))
                if rank == self.communicator.rank:
                    yield position + place, self.devices[device]
            position += self.micro_batches

    def _stop_agreed(self) -> bool:
        """Tell whether any rank was asked to stop: all have to leave after the same step."""
        return bool(self.communicator.sum(np.array([float(self.stop_asked)]))[0])

    def _rate(self) -> float:
        optimizer = self.settings.optimizer
        return learning_rate(
            self.step + 1, optimizer.lr, optimizer.warmup_steps, optimizer.num_steps
        )

    def _description(self) -> str:
        return (
            f"{self.settings.student.student_model}, "
            f"{parameter_count(self.student):,} parameters; "
            f"{self.manifest.totals['sequences']:,} sequences, "
            f"{self.source.order.batches_per_epoch:,} batches an epoch; "
            f"{self.communicator.size} rank(s) x {len(self.devices)} device(s), "
            f"{self.micro_batches} micro-batch(es) an update; "
            f"{os.environ.get('OMP_NUM_THREADS')} OpenMP thread(s) a rank; from step {self.step}"
        )

    def _forward_backward(self, number: int, batch: DeviceBatch, tokens: int) -> None:
        settings = self.settings.loss
        teacher_logits = None
        if self.teacher is not None:
            with self._timer("teacher"):
                teacher_logits = self.teacher.logits(batch)
        # Keyed by the micro-batch, so dropout depends neither on ranks nor on interruptions.
        key = np.random.SeedSequence([self.settings.run.seed, number]).generate_state(1)[0]
        mx.random.seed(int(key) & MASK_31_BITS, ctx=batch.labels.context)
        scale = self.trainer.loss_scale.value if self.trainer.loss_scale else 1.0
        with self._timer("student"):
            rows = EmbeddingRows(self.student, batch.input_ids)
            with autograd.record():
                logits = masked_logits(self.student, batch, rows)
                parts = distillation_loss(
                    logits,
                    batch.labels,
                    teacher_logits,
                    settings.mlm_weight,
                    settings.teacher_ce_weight,
                    settings.distillation_temperature,
                )
                scaled = parts.total if scale == 1.0 else parts.total * scale
            scaled.backward()
            rows.add_gradient()
            correct = correct_predictions(logits, batch.labels)
            square = nd.zeros_like(correct)
            if settings.log_teacher_mse and teacher_logits is not None:
                square = squared_distance(logits, teacher_logits).sum()
            self._interval.add(nd.concat(*parts, correct, square, dim=0), len(batch.labels), tokens)

    def _settle(self, waiting: int = 0) -> None:
        """Wait for all but the last `waiting` updates; not finite ones have changed nothing."""
        while len(self._unsettled) > waiting:
            update = self._unsettled.pop(0)
            finite = math.isfinite(float(update.norm.asscalar()))
            if self.trainer.loss_scale:
                self.trainer.loss_scale.update(overflowed=not finite)
            elif not finite:
                self._report_nonfinite(update)

    def _report_nonfinite(self, update: Update) -> None:
        name = f"nonfinite-step-{update.step:07d}.npz"
        path = os.path.join(self.settings.run.ckpt_dir, name)
        numbers = range(update.position, update.position + self.micro_batches)
        if self._first:
            batches = {n: self.source(n)._asdict() for n in numbers}
            np.savez(
                path,
                **{
                    f"{field}.{n}": a
                    for n, b in batches.items()
                    for field, a in b.items()
                    if a is not None
                },
            )
        # The first rank that leaves takes the others with it.
        self.communicator.barrier()
        what = (
            f"step {update.step}: the gradient of micro-batches {numbers[0]} to {numbers[-1]} is "
            f"not finite; they are saved in {path}; the parameters are as before the step"
        )
        if self.settings.optimizer.on_nonfinite == "stop":
            raise UserError(f"{what}; --resume with --on_nonfinite skip goes on without it")
        self._reporter.say(f"warning: {what}; skipped")

    def _log(self) -> None:
        self._settle()
        sums = self.communicator.sum(np.array(self._interval.state()))
        seconds = self._stopwatch.lap()
        total, mlm, kl, correct, square, positions, tokens = sums
        values = {"loss": total / positions, "mlm_loss": mlm / positions}
        if self.teacher is not None:
            values["kl"] = kl / positions
        if self.settings.loss.log_teacher_mse:
            values["teacher_mse"] = square / positions
        values["accuracy"] = correct / positions
        values["lr"] = self.trainer.rate
        if self.trainer.loss_scale:
            values["loss_scale"] = self.trainer.loss_scale.value
        if self._update:
            values["gradient_norm"] = float(self._update.norm.asscalar())
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
        self._settle()
        with self._stopwatch.paused():
            interval = self.communicator.sum(np.array(self._interval.state())).tolist()
            if self._first:
                self._write_checkpoint(interval, best)
            self.communicator.barrier()

    def _write_checkpoint(self, interval: list[float], best: bool) -> None:
        run = self.settings.run
        state = {
            **self.progress(),
            "interval": interval,
            "model": self.settings.student.student_model,
            "vocab_size": self.manifest.vocab_size,
            "tokenizer_fingerprint": self.manifest.tokenizer_fingerprint,
            "shards_sha256": shards_sha256(self.manifest),
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

    def _wanted_checkpoint(self) -> checkpoint.Checkpoint | None:
        run = self.settings.run
        if run.start_step:
            return checkpoint.at_step(run.ckpt_dir, run.start_step)
        if run.resume:
            return checkpoint.latest(run.ckpt_dir)
        checkpoint.require_none(run.ckpt_dir)
        return None


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


def devices_of(gpus: str | None, cpu_contexts: int, communicator: Communicator) -> list[Any]:
    """Return the devices of this process: CPU replicas, or the GPUs, of which a rank has one.

    Raises `UserError` when `gpus` is not a list of numbers.
    """
    if gpus is None:
        return [mx.cpu(number) for number in range(cpu_contexts)]
    try:
        numbers = [int(number) for number in gpus.split(",")]
    except ValueError:
        raise UserError(f"--gpus {gpus}: expected device numbers such as 0,1") from None
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
    training = _source(shards, order, settings.teacher.teacher_cache)
    if not data.data_eval:
        return training, None, shards.manifest
    held_out = open_shards(data.data_eval)
    if held_out.manifest.tokenizer_fingerprint != shards.manifest.tokenizer_fingerprint:
        raise UserError(
            f"--data_eval {data.data_eval}: made with another tokenizer than --data {data.data}"
        )
    order = BatchOrder(held_out.lengths, data.batch_size_eval, data.num_buckets, data.use_avg_len)
    return training, _source(held_out, order, settings.teacher.teacher_cache), shards.manifest


def _source(shards: ShardSet, order: BatchOrder, teacher_cache: str | None) -> BatchSource:
    rows = open_rows(teacher_cache, shards) if teacher_cache else None
    return BatchSource(shards, order, shards.manifest.pad_id, rows)


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
