"""The training loop that pretraining and fine-tuning share: updates, log, evaluation, checkpoints.

It runs in one or many processes, on one or several devices, and resumes after interruptions.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Callable, Generator, Iterator, NamedTuple, Optional, Sequence

import mxnet as mx
import numpy as np

from bort import bfloat16, checkpoint
from bort.bort import parameter_count
from bort.communicator import Communicator
from bort.devices import unused_gpus
from bort.dropout import dropout
from bort.errors import DivergedError, Stopped, UserError
from bort.parameters import load_parameters
from bort.reporter import Reporter
from bort.training.job import Batch, Interrupted, Job, Metrics, Progress, Resumed
from bort.training.optimization import Trainer
from bort.training.reporting import MetricAccumulator, PhaseTimer, Stopwatch
from bort.types import Context, JSONObject, NDArray
from data.batches import SAMPLER_VERSION, prefetch

MASK_31_BITS = 0x7FFFFFFF
# Updates in a row that may be skipped because their gradient is not finite.
MAX_SKIPPED = 100
# Rises when the bits of an update change on purpose: 1 since dropout is drawn by NumPy.
ARITHMETIC_VERSION = 1


class MicroBatch(NamedTuple):
    """A micro-batch, its number in the stream, and the device of this process it goes to."""

    number: int
    device: Context
    batch: Batch


class Update(NamedTuple):
    """An update that the devices may still be working on."""

    step: int
    numbers: range  # of its micro-batches
    norm: NDArray  # of the gradient, [1]


class Loop:
    """Trains a job up to its last step.

    An update takes `micro_batches` of the stream, whatever the number of ranks and devices they
    are divided among.

    Args:
        job: what is trained.
        trainer: the optimizer of its network.
        communicator: the other processes.
        devices: of this process, each with a replica of the network.
        reporter: where metrics and messages go.
        accumulate: micro-batches per worker and update.
        log_interval: updates between two metric lines.
        on_nonfinite: `stop` or `skip`, for a gradient that is not finite.
    """

    def __init__(
        self,
        job: Job,
        trainer: Trainer,
        communicator: Communicator,
        devices: Sequence[Context],
        reporter: Reporter,
        *,
        accumulate: int = 1,
        log_interval: int = 10,
        on_nonfinite: str = "stop",
    ) -> None:
        self.job, self.trainer = job, trainer
        self.communicator, self.devices = communicator, devices
        self.reporter = reporter
        self.progress = Progress()
        self._accumulate = accumulate
        self.micro_batches = accumulate * self._workers
        self.stop_requested = False
        self.stop_signal = int(signal.SIGTERM)  # that asked for it, where it reached this rank
        self._log_interval, self._on_nonfinite = log_interval, on_nonfinite
        self._accumulator = self._new_accumulator()
        self._untimed_tokens = 0.0  # of the interval, read before this process resumed the run
        self._last_update: Update | None = None
        self._pending_updates: list[Update] = []
        self._skipped = 0  # updates in a row whose gradient was not finite
        self._evaluation_pending = False
        self._ended_early = False  # by the last evaluation
        self._stopwatch = Stopwatch()
        self._timer = PhaseTimer()

    # ---- set-up ---------------------------------------------------------------------------------

    def run(self) -> list[Metrics]:
        """Train up to the last step; returns the evaluations, one before training if it is due."""
        self.setup()
        return self.train()

    def setup(self) -> None:
        """Load a checkpoint if one is asked for, make all ranks equal, open the log."""
        self.load_checkpoint()
        self.broadcast_state()
        self.start()

    def load_checkpoint(self) -> None:
        """Load the checkpoint that is asked for on rank 0, from which the other ranks get it."""
        if not self._is_first:
            return
        saving = self.job.saving
        found = checkpoint.requested(saving.folder, saving.resume, saving.start_step)
        if found is None:
            return
        resumed = self.check_resume(found)
        micro_batches = self.micro_batches
        if found.state.get("arithmetic") != ARITHMETIC_VERSION:
            print(
                f"warning: {saving.folder}: made by a version with other dropout masks and "
                "rounding; the result is not bit-identical to an uninterrupted run",
                file=sys.stderr,
            )
        load_parameters(self.job.network, found.model_path)
        self.trainer.load_state(found.trainer_arrays())
        self.load_state(found.state)
        self.micro_batches = micro_batches
        if not resumed.best_counts:
            self.progress.best_score, self.progress.best_step = -math.inf, None
        later = bool(saving.start_step)
        checkpoint.rewind(saving.folder, self.progress.step, self.progress.best_step, later)

    def check_resume(self, found: checkpoint.Checkpoint) -> Resumed:
        """Take over the number of micro-batches of an update from a checkpoint to be resumed.

        Raises `UserError` when this run cannot resume it.
        """
        if found.state.get("order") != SAMPLER_VERSION:
            raise UserError(
                f"{self.job.saving.folder}: its batches were drawn in the order of another "
                "version; start a new run from its parameters, in another folder"
            )
        _require_state(found)
        resumed = self.job.saving.check_resume(found.state)
        self.micro_batches = found.state["micro_batches"]
        if resumed.accumulate != self._accumulate:
            self.micro_batches = self._accumulate * self._workers
        self._require_micro_batches()  # now: later checkpoints are deleted next
        return resumed

    def _require_micro_batches(self) -> None:
        if self.micro_batches < self._workers:
            raise UserError(
                f"an update of this run takes {self.micro_batches} micro-batches, too few for "
                f"{self._workers} workers; start fewer, or change the batch by --accumulate"
            )

    def broadcast_state(self) -> None:
        """Give every rank the progress, the parameters and the optimizer state of rank 0."""
        self.load_state(self.communicator.broadcast_object(self.state()))
        self.communicator.broadcast(self.arrays())
        bfloat16.refresh(self.job.network.collect_params().values())

    def start(self, may_idle: bool = False) -> None:
        """Divide the micro-batches among the current ranks, and open the log on rank 0.

        Raises `UserError` when there are more workers than micro-batches in an update, unless the
        others `may_idle`.
        """
        if not may_idle:
            self._require_micro_batches()
        gradients = "add" if self._accumulates else "write"
        self.job.network.collect_params().setattr("grad_req", gradients)
        self.reporter.start(
            self.job.saving.settings,
            self.progress.step,
            self.job.max_steps(),
            self._evaluation_pending,
        )
        names = self.communicator.allgather_object([str(device) for device in self.devices])
        for line in (self._description(names), *self.job.notes):
            self.reporter.say(line)
        if self.micro_batches < self._workers:
            self.reporter.say(
                f"warning: {self._workers - self.micro_batches} of {self._workers} workers have "
                "nothing to do; a run that is started with a larger --accumulate has work for them"
            )
        if hint := unused_gpus(self.devices):
            self.reporter.say(f"warning: {hint}")

    # ---- training -------------------------------------------------------------------------------

    def train(self, commit: Callable[[], None] | None = None) -> list[Metrics]:
        """Train from where `start` left the run up to the last step; returns the evaluations.

        `commit` is called between two steps, after each metric line: a moment when the sums of the
        interval are empty. Raises `Stopped` when a rank got SIGTERM or SIGHUP, after a checkpoint.
        """
        evaluations: list[Metrics] = []
        with closing(self.batches()) as batches, self.reporter, stop_on_signals(self):
            self._ended_early = self.job.evaluation.stop_early()
            stop = self._evaluate_before_training(evaluations)
            self._stopwatch.lap()
            while not self.finished() and not stop:
                if commit and self.progress.step % self._log_interval == 0:
                    commit()
                self.train_step(batches)
                stop = self._stop_agreed()
                if self._log_due(self.progress.step):
                    self._log_metrics()
                stop = self._save_and_evaluate(evaluations, stop)
            if stop:
                step = self.progress.step
                raise Stopped(self.stop_signal, f"stopped after step {step}; --resume continues")
        return evaluations

    def train_step(self, batches: Iterator[MicroBatch]) -> None:
        """Make one update from the next micro-batches."""
        job, progress = self.job, self.progress
        self._timer.measured = self._log_due(progress.step + 1)
        numbers = self.update_numbers(progress.batches)
        self._clear_gradients(numbers)
        count = 0
        for _ in self._own(numbers):
            with self._timer("data"):
                number, device, batch = next(batches)
                if not len(batch.labels):  # a batch of sequences without masks
                    self.add_empty(batch, device)
                    continue
                on_device = job.step.to_device(batch, device)
            self._seed_dropout(number, device)
            sums = job.step(on_device, self._scale, self._timer)
            self._accumulator.add(sums, len(batch.labels), batch.tokens)
            count += len(batch.labels)
        with self._timer("communication"):
            total = self.trainer.sum_gradients(count)
        with self._timer("update"):
            norm = self.trainer.update(total, job.learning_rate(progress.step + 1))
        progress.step += 1
        progress.batches += len(numbers)
        self._last_update = Update(progress.step, numbers, norm)
        self._pending_updates.append(self._last_update)
        # One step may wait in the device's queue, no more: a run that is told to stop ends soon.
        self._wait_for_updates(waiting=0 if self.trainer.loss_scale else 1)
        self.reporter.advance()

    def add_empty(self, batch: Batch, device: Context) -> None:
        """Count a micro-batch that has nothing to learn from: its gradient is zero."""
        self._accumulator.tokens += batch.tokens
        if not self._accumulates:  # no backward pass overwrites the gradient of the last update
            for parameter in self.job.network.collect_params().values():
                if parameter.grad_req != "null":
                    parameter.grad(device)[:] = 0

    def batches(self) -> Generator[MicroBatch, None, None]:
        """Yield the micro-batches of this rank, without end, prepared ahead."""
        return prefetch(
            lambda item: MicroBatch(item[0], item[1], self.job.stream.source(item[0])),
            self._own_stream(),
        )

    def update_numbers(self, start: int) -> range:
        """Return the numbers of the micro-batches of the update that starts at `start`.

        With `whole_epochs` the last update of an epoch may have fewer.
        """
        end = start + self.micro_batches
        if self.job.stream.whole_epochs:
            epoch = self.job.stream.source.batches_per_epoch
            end = min(end, (start // epoch + 1) * epoch)
        return range(start, end)

    def finished(self) -> bool:
        """Return whether the last step has been made, or the evaluation ends the run early."""
        return self.progress.step >= self.job.max_steps() or self._ended_early

    # ---- state ----------------------------------------------------------------------------------

    def state(self) -> JSONObject:
        """Return how far the run is as plain data; `interval` counts this rank's part only."""
        scale = self.trainer.loss_scale
        return {
            "step": self.progress.step,
            "position": self.progress.batches,
            "micro_batches": self.micro_batches,
            "loss_scale": [scale.value, scale.good_updates] if scale else None,
            "best_score": self.progress.best_score,
            "best_step": self.progress.best_step,
            "interval": self._accumulator.state(),
            **({"evaluation_pending": True} if self._evaluation_pending else {}),
            **self.job.extra.state(),
        }

    def load_state(self, state: JSONObject) -> None:
        """Restore the `state` of rank 0; the other ranks' intervals start empty."""
        self.progress = Progress(
            state["step"], state["position"], state["best_score"], state["best_step"]
        )
        self.micro_batches = state["micro_batches"]
        scale = self.trainer.loss_scale
        if scale and state["loss_scale"]:
            scale.value, scale.good_updates = state["loss_scale"]
        self._accumulator = self._new_accumulator()
        self._untimed_tokens = state["interval"][-1]
        if self._is_first:
            self._accumulator.load_state(state["interval"])
        self._last_update, self._pending_updates = None, []
        self._evaluation_pending = bool(state.get("evaluation_pending"))
        self.job.extra.load_state(state)

    def parameters(self) -> list[NDArray]:
        """Return the arrays of the network's parameters on each device."""
        return [a for p in self.job.network.collect_params().values() for a in p.list_data()]

    def arrays(self) -> list[NDArray]:
        """Return all that an update changes: parameters on each device, optimizer state."""
        return [*self.parameters(), *self.trainer.state().values()]

    def save(self, evaluation_pending: bool = False) -> None:
        """Write a checkpoint on rank 0; a pending evaluation follows, here or in a resumed run."""
        self._evaluation_pending = evaluation_pending
        self._write(self._write_checkpoint)

    def _write(self, write: Callable[[JSONObject], None]) -> None:
        """Call `write` on rank 0 with what state.json holds."""
        self._wait_for_updates()
        with self._stopwatch.paused():
            interval = self.communicator.allreduce(np.array(self._accumulator.state())).tolist()
            if self._is_first:
                saving = self.job.saving
                state = {**self.state(), "interval": interval, "settings": saving.settings}
                versions = {"order": SAMPLER_VERSION, "arithmetic": ARITHMETIC_VERSION}
                write({**state, **versions, **saving.identity})
            self.communicator.barrier()

    def _write_checkpoint(self, state: JSONObject) -> None:
        saving, progress = self.job.saving, self.progress
        path = checkpoint.save(
            saving.folder,
            progress.step,
            lambda path: saving.write_model(path, progress),
            {name: array.asnumpy() for name, array in self.trainer.state().items()},
            state,
            unfinished=self._evaluation_pending,
        )
        checkpoint.prune(saving.folder, saving.keep, progress.best_step)
        self.reporter.say(f"step {progress.step:>7}  saved {path}")

    def _amend_checkpoint(self, state: JSONObject) -> None:
        saving, progress = self.job.saving, self.progress
        path = checkpoint.path_of(saving.folder, progress.step)
        checkpoint.amend(path, lambda path: saving.write_config(path, progress), state)

    def _point_to_best(self) -> None:
        saving, step = self.job.saving, self.progress.step
        path = checkpoint.path_of(saving.folder, step)
        if self._is_first and os.path.isdir(path):
            checkpoint.point(saving.folder, checkpoint.BEST, os.path.basename(path))
            checkpoint.prune(saving.folder, saving.keep, step)

    # ---- workers --------------------------------------------------------------------------------

    @property
    def _workers(self) -> int:
        return self.communicator.size * len(self.devices)

    @property
    def _is_first(self) -> bool:
        return self.communicator.rank == 0

    @property
    def _accumulates(self) -> bool:
        return self.micro_batches > self._workers

    def _own(self, numbers: range) -> list[tuple[int, Context]]:
        """Return (number, device) of this rank's micro-batches: worker w has w, w + workers, ..."""
        own = []
        for index, number in enumerate(numbers):
            rank, device = divmod(index % self._workers, len(self.devices))
            if rank == self.communicator.rank:
                own.append((number, self.devices[device]))
        return own

    def _own_stream(self) -> Iterator[tuple[int, Context]]:
        start = self.progress.batches
        while True:
            numbers = self.update_numbers(start)
            yield from self._own(numbers)
            start += len(numbers)

    def _stop_agreed(self) -> bool:
        """Return whether any rank was asked to stop: all have to leave after the same step."""
        return bool(self.communicator.allreduce(np.array([float(self.stop_requested)]))[0])

    # ---- parts of a step ------------------------------------------------------------------------

    @property
    def _scale(self) -> float:
        return self.trainer.loss_scale.value if self.trainer.loss_scale else 1.0

    def _clear_gradients(self, numbers: range) -> None:
        """Zero the gradients of the last update where the backward passes do not overwrite them."""
        if self._accumulates or len(numbers) < self._workers:
            self.trainer.zero_gradients()
        self.job.clear_added()

    def _seed_dropout(self, number: int, device: Context) -> None:
        """Key dropout by the micro-batch: it depends neither on ranks nor on interruptions."""
        sequence = np.random.SeedSequence([self.job.stream.seed, number])
        seed = int(sequence.generate_state(1)[0])
        mx.random.seed(seed & MASK_31_BITS, ctx=device)
        dropout.seed(seed)

    def _wait_for_updates(self, waiting: int = 0) -> None:
        """Wait for all but the last `waiting` updates; not finite ones have changed nothing."""
        while len(self._pending_updates) > waiting:
            update = self._pending_updates.pop(0)
            finite = math.isfinite(float(update.norm.asscalar()))
            self._skipped = 0 if finite else self._skipped + 1
            if self._skipped > MAX_SKIPPED:
                raise DivergedError(
                    f"step {update.step}: the gradient of {self._skipped} updates in a row is not "
                    "finite, the run does not learn; lower --lr or resume from an earlier step"
                )
            scale = self.trainer.loss_scale
            # An overflow is part of the method as long as a smaller scale can prevent it.
            expected = finite or (scale is not None and scale.value > 1)
            if scale:
                scale.update(overflowed=not finite)
            if not expected:
                self._report_nonfinite(update)

    def _report_nonfinite(self, update: Update) -> None:
        numbers, arrays = update.numbers, {}
        for number in numbers if self._is_first else ():
            fields = self.job.stream.source(number)._asdict()
            arrays.update({f"{n}.{number}": a for n, a in fields.items() if a is not None})
        path = self.reporter.save_arrays(f"nonfinite-step-{update.step:07d}.npz", arrays)
        # The first rank that leaves takes the others with it.
        self.communicator.barrier()
        what = (
            f"step {update.step}: the gradient of micro-batches {numbers[0]} to {numbers[-1]} is "
            f"not finite; they are saved in {path}; the parameters are as before the step"
        )
        if self._on_nonfinite == "stop":
            raise DivergedError(f"{what}; --resume with --on_nonfinite skip continues without it")
        self.reporter.say(f"warning: {what}; skipped")

    # ---- metrics --------------------------------------------------------------------------------

    def _new_accumulator(self) -> MetricAccumulator:
        return MetricAccumulator(self.devices[0], len(self.job.step.metric_names))

    def _log_due(self, step: int) -> bool:
        """Return whether a metric line follows a step, which is then timed phase by phase."""
        return step % self._log_interval == 0 or step == self.job.max_steps()

    def _description(self, devices: Sequence[Sequence[str]]) -> str:
        """Return the first line of the log; `devices` are those of each rank."""
        named = "; ".join(", ".join(names) for names in devices)
        return (
            f"{self.job.title}; {parameter_count(self.job.network):,} parameters; "
            f"{self.job.stream.source.batches_per_epoch:,} batches per epoch; "
            f"{self.communicator.size} rank(s) x {len(self.devices)} device(s) ({named}), "
            f"{self.micro_batches} micro-batch(es) per update; "
            f"{os.environ.get('OMP_NUM_THREADS')} OpenMP thread(s) per rank; "
            f"from step {self.progress.step}"
        )

    def _log_metrics(self) -> None:
        self._wait_for_updates()
        state = self.communicator.allreduce(np.array(self._accumulator.state()))
        *sums, count, tokens = state
        seconds = self._stopwatch.lap()
        means = {name: s / (count or 1) for name, s in zip(self.job.step.metric_names, sums)}
        values = self.job.step.metrics(means, self.progress)
        values["lr"] = self.trainer.rate
        if self.trainer.loss_scale:
            values["loss_scale"] = self.trainer.loss_scale.value
        if self._last_update:
            values["gradient_norm"] = float(self._last_update.norm.asscalar())
        values["tokens_per_second"] = round((tokens - self._untimed_tokens) / seconds)
        self.reporter.log(self.progress.step, "train", {**values, **self._timer.shares()})
        self._accumulator, self._untimed_tokens = self._new_accumulator(), 0.0

    # ---- evaluation -----------------------------------------------------------------------------

    def _evaluate_before_training(self, evaluations: list[Metrics]) -> bool:
        """Evaluate a new run, or do the evaluation that was pending when a resumed run stopped.

        Returns whether to stop.
        """
        if self._evaluation_pending:
            return self._evaluate_step(evaluations, saved=True)
        if self.progress.step or not self.job.evaluation.due(self.progress):
            return False
        metrics = self._evaluate()
        evaluations += [] if metrics is None else [metrics]
        return metrics is None

    def _save_and_evaluate(self, evaluations: list[Metrics], stop: bool) -> bool:
        """Do what follows the update just made; returns whether to stop.

        The checkpoint comes first: a run that is killed in its evaluation has lost nothing.
        """
        evaluation_due = self.job.evaluation.due(self.progress)
        saved = stop or self.job.saving.due(self.progress, False)
        if saved:
            self.save(evaluation_pending=evaluation_due)
        if stop or not evaluation_due:
            return stop
        return self._evaluate_step(evaluations, saved)

    def _evaluate_step(self, evaluations: list[Metrics], saved: bool) -> bool:
        """Evaluate, then finish the checkpoint of the step; returns whether to stop."""
        metrics = self._evaluate()
        if metrics is None:
            if not saved:
                self.save(evaluation_pending=True)
            return True
        evaluations.append(metrics)
        best = self._update_best(metrics)
        self._ended_early = self.job.evaluation.stop_early()
        self._evaluation_pending = False
        if saved:
            self._write(self._amend_checkpoint)
        elif self.job.saving.due(self.progress, best):
            self.save()
        if best:
            self._point_to_best()
        return False

    def _evaluate(self) -> Metrics | None:
        """Return the metrics; None when a rank was told to stop before the end."""
        try:
            with self._stopwatch.paused():
                result = self.job.evaluation.run(lambda: self.stop_requested)
        except Interrupted:
            return None
        if result:
            self.reporter.log(self.progress.step, "eval", result)
        return result

    def _update_best(self, metrics: Metrics) -> bool:
        evaluation, progress = self.job.evaluation, self.progress
        score = evaluation.score(metrics) if metrics else -math.inf
        best = score > progress.best_score
        if best:
            progress.best_score, progress.best_step = score, progress.step
        evaluation.record(progress, metrics, best and self._is_first)
        return best


@dataclass(frozen=True)
class _ProgressState:
    """The part of state.json that every run has."""

    step: int
    position: int
    micro_batches: int
    best_score: float
    best_step: Optional[int]
    interval: list[float]
    settings: dict[str, JSONObject]
    loss_scale: Optional[list[float]] = None


def _require_state(found: checkpoint.Checkpoint) -> None:
    """Raise `UserError` when a value of a checkpoint's state is missing or of another type."""
    import msgspec

    try:
        msgspec.convert(found.state, _ProgressState)
    except msgspec.ValidationError as error:
        path = os.path.join(found.path, checkpoint.STATE)
        raise UserError(f"{path}: is not the state of a run ({error})") from None


@contextmanager
def stop_on_signals(loop: Loop) -> Iterator[None]:
    """Let a signal end the run after its step.

    A cluster sends SIGTERM before it takes a machine, the system SIGHUP when the terminal is
    closed; under nohup that is ignored.
    """
    terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def request(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # to write to a closed terminal would be an error
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        loop.stop_requested, loop.stop_signal = True, number

    caught = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    before = [(number, signal.signal(number, request)) for number in caught]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
