"""What the training loop is given: data stream, step, schedule, evaluation and save policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Optional, Protocol, Sequence

from bort.training.reporting import PhaseTimer
from bort.types import Block, Context, JSONMapping, JSONObject, NDArray

Metrics = dict[str, float]
Batch = Any  # a micro-batch of a job: a NamedTuple of arrays
StopRequested = Callable[[], bool]


@dataclass
class Progress:
    """How far a run is.

    With the parameters and the optimizer state this is all that a resumed run needs: which
    sequences micro-batch k holds is a pure function of the seed and k (see data.batches).
    """

    step: int = 0  # updates made
    batches: int = 0  # micro-batches of the stream that all ranks together have consumed
    best_score: float = -math.inf
    best_step: Optional[int] = None


class Source(Protocol):
    """Micro-batches by their number in an endless stream."""

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches of one pass over the data."""

    def __call__(self, position: int) -> Batch:
        """Return a NamedTuple of arrays with `tokens`, and `labels` [what the loss averages]."""


class Stream(NamedTuple):
    """The training data of a run."""

    source: Source
    seed: int  # of dropout, which is keyed by it and the number of the micro-batch
    whole_epochs: bool = False  # no update mixes micro-batches of two epochs


class Step(Protocol):
    """Forward and backward pass of one micro-batch."""

    @property
    def metric_names(self) -> Sequence[str]:
        """Return the names of the sums."""

    def to_device(self, batch: Batch, device: Context) -> Batch:
        """Copy a micro-batch to a device."""

    def __call__(self, batch: Batch, scale: float, timer: PhaseTimer) -> NDArray:
        """Add the gradients of a micro-batch on its device, of the loss times `scale`.

        Returns the sums [len(metric_names)] over its labels.
        """

    def metrics(self, means: Metrics, progress: Progress) -> Metrics:
        """Return what a metric line reports, from the means of an interval by name."""


class ExtraState(Protocol):
    """What a checkpoint keeps besides the progress, the parameters and the optimizer state."""

    def state(self) -> JSONObject:
        """Return plain data, written into state.json."""

    def load_state(self, state: JSONMapping) -> None:
        """Restore what `state` returned."""


class NoExtraState:
    """Nothing besides."""

    def state(self) -> JSONObject:
        """Return nothing."""
        return {}

    def load_state(self, state: JSONMapping) -> None:
        """Restore nothing."""


class Interrupted(Exception):  # noqa: N818  (no error: a signal asked for it)
    """An evaluation was interrupted because a rank was told to stop."""


def _ignore(progress: Progress, metrics: Metrics, best: bool) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Evaluation:
    """When and how a run is evaluated."""

    due: Callable[[Progress], bool]  # after the update just made; before the first at step 0
    # Returns the same on all ranks, empty without held-out data. The argument tells whether this
    # rank was told to stop; when any was, all raise `Interrupted`.
    run: Callable[[StopRequested], Metrics]
    score: Callable[[Metrics], float]  # higher is better
    record: Callable[[Progress, Metrics, bool], None] = _ignore  # with whether it is the best
    stop_early: Callable[[], bool] = _never  # asked at the start and after each evaluation


class Resumed(NamedTuple):
    """What a run takes over from the settings of its checkpoint."""

    accumulate: int  # micro-batches per worker and update
    best_counts: bool = True  # its best score was measured on the current held-out data


@dataclass(frozen=True)
class SavePolicy:
    """Where, when and what a run saves, and which checkpoint it starts from."""

    folder: str
    due: Callable[[Progress, bool], bool]  # after an update; with whether its evaluation is best
    write_model: Callable[[str, Progress], None]  # parameters, and what belongs beside them
    write_config: Callable[[str, Progress], None]  # only what belongs beside the parameters
    identity: JSONMapping  # what state.json says of the run besides its progress
    # Takes the state of a checkpoint; raises `UserError` when these settings cannot resume it.
    check_resume: Callable[[JSONMapping], Resumed]
    settings: JSONMapping  # the content of config.json
    keep: int = 1
    resume: bool = False
    start_step: int = 0


@dataclass(frozen=True)
class Job:
    """All that the loop needs to know of what it trains."""

    title: str  # for the first line of the log
    network: Block
    stream: Stream
    step: Step
    learning_rate: Callable[[int], float]  # of the updates 1, 2, ...
    max_steps: Callable[[], int]  # known once a checkpoint to be resumed has been loaded
    evaluation: Evaluation
    saving: SavePolicy
    extra: ExtraState = field(default_factory=NoExtraState)
    # Zeroes the gradients that backward passes add to even where they overwrite the others.
    clear_added: Callable[[], None] = lambda: None
    notes: Sequence[str] = ()  # further lines for the start of the log
