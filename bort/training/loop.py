"""The training loop that pretraining and fine-tuning share: updates, log, evaluation, checkpoints;
in one or many processes, on one or many devices, interrupted or not.
"""

from __future__ import annotations

import abc
import math
import os
import signal
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, Callable, Generator, Iterator, NamedTuple, Protocol, Sequence

import mxnet as mx
import numpy as np

from bort import checkpoint
from bort.bort import parameter_count
from bort.communicator import Communicator
from bort.config import as_dict
from bort.errors import UserError
from bort.files import write_json
from bort.parameters import load_parameters
from bort.training.optimization import LossScale, Trainer
from bort.training.reporting import Interval, PhaseTimer, Reporter, Stopwatch
from data.batches import SAMPLER_VERSION, prefetch

MASK_31_BITS = 0x7FFFFFFF


class Source(Protocol):
    """What is learnt from: micro-batches by their number in an endless stream."""

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches that use everything once."""

    def __call__(self, position: int) -> Any:
        """Return a NamedTuple of arrays with `tokens`, and `labels` [what the loss averages]."""


class MicroBatch(NamedTuple):
    """A batch, its number in the endless stream, and the device of this process it goes to."""

    number: int
    device: Any
    batch: Any


class Update(NamedTuple):
    """An update that the devices may still be working on."""

    step: int
    numbers: range  # of its micro-batches
    norm: Any  # of the gradient, NDArray [1]


class Training(abc.ABC):
    """One run: what it trains, from what, and how far it is.

    `step` counts updates made, `position` the micro-batches of the endless stream that all ranks
    together have used. Both, with the parameters and the optimiser's state, are all that a resumed
    run needs (see data.batches). An update takes `micro_batches` of them, whatever the number of
    ranks and devices they are shared out to.

    Args:
        settings: a NamedTuple of settings with the members `run` and `optimizer`.
        communicator: the other processes.
        devices: of this process, each with a replica of the network.
        network: what is trained.
        source: what it learns from.
        accumulate: micro-batches per worker and update.
        last_step: updates to make.
        sums: names of the sums that `_forward_backward` adds to the interval.
        weight_bound: with one, the optimiser is SGD and no weight leaves the bound.
    """

    def __init__(
        self,
        settings: Any,
        communicator: Communicator,
        devices: list[Any],
        network: Any,
        source: Source,
        accumulate: int,
        last_step: int,
        sums: Sequence[str],
        weight_bound: float | None = None,
    ) -> None:
        self.settings = settings
        self.communicator = communicator
        self.devices = devices
        self.network = network
        self.source = source
        self.step = 0
        self.position = 0
        self.micro_batches = accumulate * self._workers
        self.last_step = last_step
        self.best_score = -math.inf
        self.best_step: int | None = None
        self.stop_asked = False
        optimizer = settings.optimizer
        self.trainer = Trainer(
            list(network.collect_params().values()),
            communicator,
            weight_decay=optimizer.weight_decay,
            epsilon=optimizer.epsilon,
            max_norm=optimizer.max_norm,
            loss_scale=LossScale() if optimizer.dtype == "float16" else None,
            compression=optimizer.compression,
            weight_bound=weight_bound,
        )
        self._sums = tuple(sums)
        self._interval = Interval(devices[0], len(sums))
        self._update: Update | None = None
        self._unsettled: list[Update] = []
        self._stopwatch = Stopwatch()
        self._timer = PhaseTimer()

    # ---- what a kind of training says of itself ---------------------------------------------

    @property
    @abc.abstractmethod
    def folder(self) -> str:
        """Return the folder of checkpoints and metrics."""

    @abc.abstractmethod
    def _forward_backward(self, number: int, batch: Any, tokens: int) -> None:
        """Add the gradients of a micro-batch of its device, and its sums to the interval."""

    @abc.abstractmethod
    def _to_device(self, batch: Any, device: Any) -> Any:
        """Copy a micro-batch to a device."""

    @abc.abstractmethod
    def _rate(self) -> float:
        """Return the learning rate of the update that comes next."""

    @abc.abstractmethod
    def _figures(self, means: dict[str, float]) -> dict[str, float]:
        """Return what a metric line says, from the interval's means."""

    @abc.abstractmethod
    def _evaluation(self) -> dict[str, float]:
        """Return the figures on held-out data, the same on all ranks; empty without such data."""

    @abc.abstractmethod
    def _evaluation_due(self) -> bool:
        """Tell whether the step just made is followed by an evaluation."""

    @abc.abstractmethod
    def _score(self, evaluation: dict[str, float]) -> float:
        """Return what the best evaluation is chosen by: higher is better."""

    @abc.abstractmethod
    def _checkpoint_due(self, best: bool) -> bool:
        """Tell whether the step just made is followed by a checkpoint; `best`: it is the best."""

    @abc.abstractmethod
    def _require_same_stream(self, state: dict[str, Any]) -> None:
        """Raise `UserError` when the micro-batches are not those that a checkpoint counts."""

    @abc.abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint says besides the progress, for `_require_same_stream`."""

    @abc.abstractmethod
    def _write_model(self, path: str) -> None:
        """Write the parameters to `path` of a checkpoint's folder, with what belongs to them."""

    @abc.abstractmethod
    def _subject(self) -> str:
        """Return what is trained from what, for the first line of the log."""

    # ---- the run ----------------------------------------------------------------------------

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
        if found.state.get("order") != SAMPLER_VERSION:
            raise UserError(
                f"{self.folder}: its batches were drawn in the order of another version; begin a "
                "new run from its parameters, in another folder"
            )
        self._require_same_stream(found.state)
        load_parameters(self.network, found.model_path)
        self.trainer.load_state(found.trainer_arrays())
        self.set_progress(found.state)
        checkpoint.rewind(self.folder, self.step, self.best_step)

    def synchronise(self) -> None:
        """Give every rank the progress, the parameters and the optimiser's state of rank 0."""
        self.set_progress(self.communicator.broadcast_object(self.progress()))
        self.communicator.broadcast(self.arrays())

    def enter(self) -> None:
        """Share out the micro-batches to the ranks there are, and open the log on rank 0.

        Raises `UserError` when there are more workers than micro-batches in an update.
        """
        if self.micro_batches < self._workers:
            raise UserError(
                f"an update of this run takes {self.micro_batches} micro-batches, "
                f"too few for {self._workers} workers; start fewer"
            )
        gradients = "add" if self._accumulates else "write"
        self.network.collect_params().setattr("grad_req", gradients)
        if self._first:
            os.makedirs(self.folder, exist_ok=True)
            write_json(os.path.join(self.folder, "config.json"), as_dict(*self.settings))
        self._reporter = Reporter(self.folder, self.last_step, self.step, enabled=self._first)
        self._reporter.say(self._description())

    def train(self, commit: Callable[[], None] | None = None) -> list[dict[str, float]]:
        """Train from where `enter` left the run up to the last step; returns the evaluations.

        `commit` is called between two steps, after each metric line: a moment when the sums of the
        interval are empty.
        """
        run = self.settings.run
        with closing(self.batches()) as batches, self._reporter, stop_on_sigterm(self):
            # A resumed run has had its evaluation of this step.
            new = not self.step and self._evaluation_due()
            evaluations = [self._evaluate()] if new else []
            self._stopwatch.lap()
            stop = False
            while not self._finished() and not stop:
                if commit and self.step % run.log_interval == 0:
                    commit()
                self.train_step(batches)
                stop = self._stop_agreed()
                if self._log_due(self.step):
                    self._log()
                best = False
                if self._evaluation_due():
                    evaluations.append(self._evaluate())
                    best = self._is_best(evaluations[-1])
                if self._checkpoint_due(best) or stop:
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
            "best_score": self.best_score,
            "best_step": self.best_step,
            "interval": self._interval.state(),
        }

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Go to where the `progress` of rank 0 says; the other ranks' intervals start empty."""
        self.step, self.position = progress["step"], progress["position"]
        self.micro_batches = progress["micro_batches"]
        self.best_score, self.best_step = progress["best_score"], progress["best_step"]
        scale = self.trainer.loss_scale
        if scale and progress["loss_scale"]:
            scale.value, scale.good_updates = progress["loss_scale"]
        self._interval = Interval(self.devices[0], len(self._sums))
        if self._first:
            self._interval.load_state(progress["interval"])
        self._update, self._unsettled = None, []

    def parameters(self) -> list[Any]:
        """Return the arrays of the network's parameters on each device."""
        return [a for p in self.network.collect_params().values() for a in p.list_data()]

    def arrays(self) -> list[Any]:
        """Return all that an update changes: parameters on each device, optimiser's state."""
        return [*self.parameters(), *self.trainer.state().values()]

    def batches(self) -> Generator[MicroBatch, None, None]:
        """Yield the micro-batches that fall to this rank, without end, prepared ahead."""
        return prefetch(
            lambda place: MicroBatch(place[0], place[1], self.source(place[0])), self._places()
        )

    def train_step(self, batches: Iterator[MicroBatch]) -> None:
        """Make one update from the next micro-batches."""
        self._timer.measured = self._log_due(self.step + 1)
        numbers = self._numbers(self.position)
        self._clear_gradients(numbers)
        count = 0
        for _ in self._own(numbers):
            with self._timer("data"):
                number, device, batch = next(batches)
                on_device = self._to_device(batch, device)
            self._forward_backward(number, on_device, batch.tokens)
            count += len(batch.labels)
        with self._timer("communication"):
            total = self.trainer.sum_gradients(count)
        with self._timer("update"):
            norm = self.trainer.update(total, self._rate())
        self.step += 1
        self._update = Update(self.step, numbers, norm)
        self._unsettled.append(self._update)
        self.position += len(numbers)
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

    def _numbers(self, position: int) -> range:
        """Return the numbers of the micro-batches of the update that starts at `position`."""
        return range(position, position + self.micro_batches)

    def _own(self, numbers: range) -> list[tuple[int, Any]]:
        """Return (number, device) of this rank's micro-batches: worker w has w, w + workers, ..."""
        own = []
        for place, number in enumerate(numbers):
            rank, device = divmod(place % self._workers, len(self.devices))
            if rank == self.communicator.rank:
                own.append((number, self.devices[device]))
        return own

    def _clear_gradients(self, numbers: range) -> None:
        """Forget the last update's gradients where the backward passes to come would not."""
        if self._accumulates or len(numbers) < self._workers:
            self.trainer.zero_gradients()

    def _places(self) -> Iterator[tuple[int, Any]]:
        position = self.position
        while True:
            numbers = self._numbers(position)
            yield from self._own(numbers)
            position += len(numbers)

    def _finished(self) -> bool:
        return self.step >= self.last_step

    def _log_due(self, step: int) -> bool:
        """Tell whether a metric line follows a step, which is then measured phase by phase."""
        return step % self.settings.run.log_interval == 0 or step == self.last_step

    def _stop_agreed(self) -> bool:
        """Tell whether any rank was asked to stop: all have to leave after the same step."""
        return bool(self.communicator.sum(np.array([float(self.stop_asked)]))[0])

    def _description(self) -> str:
        return (
            f"{self._subject()}; {parameter_count(self.network):,} parameters; "
            f"{self.source.batches_per_epoch:,} batches an epoch; "
            f"{self.communicator.size} rank(s) x {len(self.devices)} device(s), "
            f"{self.micro_batches} micro-batch(es) an update; "
            f"{os.environ.get('OMP_NUM_THREADS')} OpenMP thread(s) a rank; from step {self.step}"
        )

    def _seed_dropout(self, number: int, device: Any) -> None:
        """Key dropout by the micro-batch: it depends neither on ranks nor on interruptions."""
        key = np.random.SeedSequence([self.settings.run.seed, number]).generate_state(1)[0]
        mx.random.seed(int(key) & MASK_31_BITS, ctx=device)

    def _scaled(self, loss: Any) -> Any:
        """Return the loss that is differentiated, or its gradient, times the loss scale if any."""
        scale = self.trainer.loss_scale.value if self.trainer.loss_scale else 1.0
        return loss if scale == 1.0 else loss * scale

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
        path = os.path.join(self.folder, f"nonfinite-step-{update.step:07d}.npz")
        if self._first:
            batches = {number: self.source(number)._asdict() for number in update.numbers}
            np.savez(
                path,
                **{
                    f"{field}.{number}": array
                    for number, batch in batches.items()
                    for field, array in batch.items()
                    if array is not None
                },
            )
        # The first rank that leaves takes the others with it.
        self.communicator.barrier()
        what = (
            f"step {update.step}: the gradient of micro-batches {update.numbers[0]} to "
            f"{update.numbers[-1]} is not finite; they are saved in {path}; "
            "the parameters are as before the step"
        )
        if self.settings.optimizer.on_nonfinite == "stop":
            raise UserError(f"{what}; --resume with --on_nonfinite skip goes on without it")
        self._reporter.say(f"warning: {what}; skipped")

    def _log(self) -> None:
        self._settle()
        *sums, count, tokens = self.communicator.sum(np.array(self._interval.state()))
        seconds = self._stopwatch.lap()
        values = self._figures({name: s / count for name, s in zip(self._sums, sums)})
        values["lr"] = self.trainer.rate
        if self.trainer.loss_scale:
            values["loss_scale"] = self.trainer.loss_scale.value
        if self._update:
            values["gradient_norm"] = float(self._update.norm.asscalar())
        values["tokens_per_second"] = round(tokens / seconds)
        self._reporter.log(self.step, "train", {**values, **self._timer.shares()})
        self._interval = Interval(self.devices[0], len(self._sums))

    def _evaluate(self) -> dict[str, float]:
        with self._stopwatch.paused():
            result = self._evaluation()
        if result:
            self._reporter.log(self.step, "eval", result)
        return result

    def _is_best(self, evaluation: dict[str, float]) -> bool:
        score = self._score(evaluation) if evaluation else -math.inf
        improved = score > self.best_score
        if improved:
            self.best_score, self.best_step = score, self.step
        return improved

    def _save(self, best: bool) -> None:
        self._settle()
        with self._stopwatch.paused():
            interval = self.communicator.sum(np.array(self._interval.state())).tolist()
            if self._first:
                self._write_checkpoint(interval, best)
            self.communicator.barrier()

    def _write_checkpoint(self, interval: list[float], best: bool) -> None:
        state = {
            **self.progress(),
            "interval": interval,
            "order": SAMPLER_VERSION,
            **self._identity(),
            "settings": as_dict(*self.settings),
        }
        arrays = {name: array.asnumpy() for name, array in self.trainer.state().items()}
        path = checkpoint.save(self.folder, self.step, self._write_model, arrays, state)
        if best:
            checkpoint.point(self.folder, checkpoint.BEST, os.path.basename(path))
        checkpoint.prune(self.folder, self.settings.run.keep_checkpoints)
        self._reporter.say(f"step {self.step:>7}  saved {path}")

    def _wanted_checkpoint(self) -> checkpoint.Checkpoint | None:
        run = self.settings.run
        if run.start_step:
            return checkpoint.at_step(self.folder, run.start_step)
        if run.resume:
            return checkpoint.latest(self.folder)
        checkpoint.require_none(self.folder)
        return None


@contextmanager
def stop_on_sigterm(run: Training) -> Iterator[None]:
    """Let SIGTERM, a cluster's notice before it takes the machine, end the run after its step."""

    def ask(number: int, frame: FrameType | None) -> None:
        run.stop_asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
