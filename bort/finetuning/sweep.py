"""A sweep: one fine-tuning run for each combination of a grid, several at a time, and their table.

    <output_dir>/<task>-sweep/sweep.json                     the flags that all runs share
                              lr=0.0001,seed=0/run.log       what a run printed
                              lr=0.0001,seed=0/<task>/       its results, as of any run
                              sweep.tsv, sweep.md            the table

Only the best run keeps its weights: those of all would fill a disk.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Mapping, NamedTuple, NoReturn, Optional, Sequence

import numpy as np

from bort import checkpoint, jobs
from bort.cluster import Cluster, WorkerKilledError, refuse_with_cluster
from bort.config import MAX_PROCESSES, as_dict, command_of, option, required
from bort.errors import UserError, quoted
from bort.files import (
    MODEL_BYTES,
    atomic_write,
    await_unlocked,
    lock_folder,
    open_parents,
    read_json_as,
    sha256_of,
    write_json,
)
from bort.finetuning.config import ClassifierSettings, FinetuningSettings
from bort.finetuning.search_space import read_space, with_values
from bort.finetuning.task_data import SETS, check_sets
from bort.jobs import Executor, ProcessDiedError, Processes
from bort.journal import DAMAGED
from bort.mxnet_setup import asked_threads
from bort.parameters import fixed_parameter_file, parameter_file
from bort.resume import changed_flags
from bort.sums import write_sums
from bort.tables import markdown_table
from bort.tokenization import TOKENIZER_FOLDER
from bort.types import Hyperparameters, JSONObject
from data.tasks import get_task

PROGRAM = Path(__file__).resolve().parents[2] / "finetune_classifier.py"
# Flags that may differ when a sweep is resumed: they change no result. The number of GPUs of a run
# would: an update takes a micro-batch for each.
FREE = (
    *("output_dir", "resume", "gpus", "log_interval", "ckpt_interval", "cache_dir"),
    "dev_batch_size",  # to be lowered where memory runs out
    "on_nonfinite",  # of the runs that it has ended: `skip` lets them continue
)
LOCK_SECONDS = 60.0  # that a run waits for the end of one in its folder, on a machine that was lost
STARTS = ("model_parameters", "pretrained_parameters")  # the flags that name weights
WEIGHTS = "weights_sha256"  # the key of `weights_sha256` in sweep.json
GPUS = "gpus_of_each"  # the key of the number of GPUs of a run there
MAX_NAME = 255  # characters of a folder's name, all of them ASCII here
STOPPED = "interrupted; rerun the same command to resume the sweep"


@dataclass(frozen=True)
class SweepSettings:
    """The grid, and how many runs at a time."""

    grid: str = required("YAML file: each line a numeric flag and the list of its values")
    jobs: int = option(
        1,
        "runs at a time; each has its share of the cores and of --gpus",
        minimum=1,
        maximum=MAX_PROCESSES,
    )


@dataclass(frozen=True)
class BestEpoch:
    """What the sweep reads of the best epoch in metrics.json."""

    score: float


@dataclass(frozen=True)
class RunMetrics:
    """What the sweep reads of a run's metrics.json."""

    best: BestEpoch
    seconds: float


@dataclass(frozen=True)
class _Grids:
    """What sweep.json has besides the flags: the names of those that grids have varied."""

    varied: list[str] = field(default_factory=list)


class SweepRun(NamedTuple):
    """A combination, the settings of its run, and the run's folder, above that of the task."""

    hparams: Hyperparameters
    settings: FinetuningSettings
    folder: str

    @property
    def results(self) -> str:
        """Return the folder of the run's results."""
        return os.path.join(self.folder, get_task(self.settings.task.task_name).name)

    @property
    def metrics_file(self) -> str:
        """Return the path of metrics.json."""
        return os.path.join(self.results, "metrics.json")

    def __str__(self) -> str:
        return os.path.basename(self.folder)

    def metrics(self) -> Optional[RunMetrics]:
        """Return the content of metrics.json, None before the run has finished or if damaged."""
        with suppress(UserError):
            if os.path.exists(self.metrics_file):
                return read_json_as(self.metrics_file, RunMetrics)
        return None


class SweepRow(NamedTuple):
    """A combination without its seed, with the scores and times of its runs.

    scores: the task's score on the dev sets, 0 to 1, one per finished run.
    """

    values: Hyperparameters
    scores: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean over the seeds, NaN before any run has finished."""
        return float(np.mean(self.scores)) if self.scores else np.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds, NaN for fewer than two."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else np.nan


def sweep(
    settings: SweepSettings, base: FinetuningSettings, cluster: Optional[str] = None
) -> list[SweepRow]:
    """Run every combination that has not finished before; returns the table, best mean first.

    `cluster` is the address of one that does the runs. A failed run does not affect the others.
    Raises `UserError` for failed runs at the end, and for a folder that contains a sweep with other
    flags, on other rows, from other weights or with other numbers of GPUs, or that another process
    writes.
    """
    refuse_with_cluster(cluster, "--jobs", settings.jobs, 1)
    task = get_task(base.task.task_name, flag="--task_name")
    folder = os.path.join(base.run.output_dir, f"{task.name}-sweep")
    runs = runs_of(settings, base, folder)
    sets, start, weights = {}, base.classifier, ""
    unfinished = any(run.metrics() is None for run in runs)
    try:
        sets = check_sets(base.task)
        start = fixed_weights(base.classifier)
        weights = weights_sha256(start)
    except UserError:  # a finished sweep shows its table without the data
        if unfinished:
            raise
    gpus = jobs.gpus_of_each(base.run.gpus, settings.jobs) if unfinished else None
    with lock_folder(folder, "--output_dir"), jobs.stopped_by_sigterm(STOPPED):
        claim(folder, base, runs[0].hparams, sets, weights, gpus)
        set_damaged_aside(runs)
        keep_best_weights(runs)  # a kill may have come before
        remove_left_checkpoints(runs)
        pending = [run for run in runs if run.metrics() is None]
        print(f"{folder}: {len(runs)} runs, {len(runs) - len(pending)} already finished")
        if pending:
            with executor_of(settings.jobs, cluster, folder, base.run.gpus) as executor:
                run_all(from_weights(pending, start), executor, runs)
        if best := keep_best_weights(runs):
            print(f"the best run, whose weights are kept: {best}")
        rows = table(runs)
        write_table(folder, rows)
    print(as_markdown(rows), end="")
    failed = [run.folder for run in runs if run.metrics() is None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, {failed[0]} first: see its run.log; rerun "
            "the same command to retry them"
        )
    return rows


def runs_of(settings: SweepSettings, base: FinetuningSettings, folder: str) -> list[SweepRun]:
    """Return one run for each combination. Raises `UserError` for an invalid grid."""
    base.check()
    space = read_space(settings.grid, base.classifier, base.optimizer, base.run)
    names = _run_names(space, folder)
    if len(set(names)) < len(space):
        raise RuntimeError(f"two combinations of {settings.grid} have one name")
    runs = []
    for hparams, name in zip(space, names):
        own = os.path.join(folder, name)
        chosen = with_values(base, {**hparams, "output_dir": own, "resume": True})
        runs.append(SweepRun(hparams, FinetuningSettings(*chosen), own))
    return runs


def _run_names(space: Sequence[Hyperparameters], folder: str) -> list[str]:
    """Return the names of the runs' folders, each the exact values of its combination.

    Raises `UserError` for one that is too long. Earlier versions shortened numbers to six digits:
    such a folder is used where its config.json has the values of the combination.
    """
    names = []
    for hparams in space:
        name = ",".join(f"{key}={spelled(value)}" for key, value in hparams.items())
        short = ",".join(f"{key}={value:g}" for key, value in hparams.items())
        if name != short and not os.path.exists(os.path.join(folder, name)):
            configs = Path(folder, short).glob("*/config.json")
            if any(_is_run_of(str(path), hparams) for path in configs):
                name = short
        if len(name) > MAX_NAME:
            raise UserError(
                f"{folder}: the folder of a run would be named {quoted(name)}, longer than "
                f"{MAX_NAME} characters; give flags with one value on the command line, not in "
                "--grid"
            )
        names.append(name)
    return names


def _is_run_of(config: str, hparams: Hyperparameters) -> bool:
    """Return whether a run's config.json, flags by concern, has the values of a combination."""
    flags: JSONObject = {}
    for group in read_json_as(config, dict[str, JSONObject]).values():
        flags.update(group)
    return all(flags.get(key) == value for key, value in hparams.items())


def spelled(value: float) -> str:
    """Return the shortest text that reads back as the number, such as 0.0001 or 20201023."""
    if isinstance(value, int):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def weights_sha256(settings: ClassifierSettings) -> str:
    """Return the SHA-256 of the weights that every run starts from, "" for random ones.

    Raises `UserError` when they are not there.
    """
    path = settings.model_parameters or settings.pretrained_parameters
    return sha256_of(parameter_file(path), MODEL_BYTES) if path else ""


def fixed_weights(settings: ClassifierSettings) -> ClassifierSettings:
    """Return the settings with the very file of the weights.

    A pretraining run that is still training has another newest checkpoint for a later run of the
    sweep. Raises `UserError` when the weights are not there.
    """
    given = {name: getattr(settings, name) for name in STARTS}
    files = {name: fixed_parameter_file(path) for name, path in given.items() if path}
    (fixed,) = with_values((settings,), files)
    return fixed


def from_weights(runs: Sequence[SweepRun], start: ClassifierSettings) -> list[SweepRun]:
    """Return runs that start from the weights of other settings."""
    values = {name: getattr(start, name) for name in STARTS}
    return [
        run._replace(settings=FinetuningSettings(*with_values(run.settings, values)))
        for run in runs
    ]


def claim(
    folder: str,
    base: FinetuningSettings,
    hparams: Hyperparameters,
    sets: Mapping[str, str],
    weights: str = "",
    gpus: Optional[int] = None,
) -> None:
    """Record what all runs share: flags, rows and weights; raises `UserError` for other ones.

    sets: SHA-256 of the training and dev sets, empty when these are gone; they may have moved.
    weights: see `weights_sha256`; also empty when they are gone; they may have another name.
    gpus: of each run; None when all have finished.
    What an earlier grid left to the flags stays recorded: its runs are there still. A flag that all
    earlier grids varied may have any value.
    """
    free = {*hparams, *FREE}
    path = os.path.join(folder, "sweep.json")
    recorded: JSONObject = {}
    varied = set(hparams)
    if os.path.exists(path):
        recorded = read_json_as(path, JSONObject)
        earlier = read_json_as(path, _Grids).varied
        free.update(name for name in earlier if name not in recorded)
        varied.update(earlier)
        rows = recorded.get(SETS) if sets else None
        if rows == sets:
            free.add("data_dir")
        if weights and recorded.get(WEIGHTS) == weights:
            free.update(
                name for name in STARTS if recorded.get(name) and getattr(base.classifier, name)
            )
        changed = changed_flags(recorded, base, free)
        if changed:
            raise UserError(
                f"{folder}: contains a sweep with another {', '.join(changed)}; give another "
                "--output_dir"
            )
        if rows and rows != sets:
            raise UserError(
                f"{folder}: contains a sweep on other rows; restore them, or give another "
                "--output_dir"
            )
        if weights and recorded.get(WEIGHTS, weights) != weights:
            raise UserError(
                f"{folder}: contains a sweep from other weights of the same name, such as an "
                "earlier checkpoint; name or restore them, or give another --output_dir"
            )
        if gpus and recorded.get(GPUS, gpus) != gpus:
            raise UserError(
                f"{folder}: contains a sweep whose runs had {recorded[GPUS]} GPU(s) each, now "
                f"{gpus}: their updates would take other numbers of examples; give --gpus and "
                "--jobs for as many, or another --output_dir"
            )
    shared = {
        name: value
        for group in as_dict(*base).values()
        for name, value in group.items()
        if name not in {*hparams, *FREE} - {"output_dir"}
    }
    known = {SETS: dict(sets), WEIGHTS: weights, GPUS: gpus}
    given = {name: value for name, value in known.items() if value}
    write_json(path, {**recorded, **shared, **given, "varied": sorted(varied)})


def set_damaged_aside(runs: Sequence[SweepRun]) -> None:
    """Rename each metrics.json that cannot be read, with a warning: its run is repeated."""
    for run in runs:
        path = run.metrics_file
        try:
            if os.path.exists(path):
                read_json_as(path, RunMetrics)
        except UserError as error:
            os.replace(path, f"{path}{DAMAGED}")
            print(
                f"warning: {error}; moved to {path}{DAMAGED}, the run is repeated", file=sys.stderr
            )


def executor_of(count: int, cluster: Optional[str], folder: str, gpus: Optional[str]) -> Executor:
    """Return where the runs of a sweep are done, here at most `count` at a time.

    When interrupted, the runs save a checkpoint and end first.
    """
    if cluster:
        return Cluster(cluster, folder, patience=math.inf, gpus=gpus)
    return Processes(count, asked_threads() or None, patience=math.inf)


def run_all(pending: Sequence[SweepRun], executor: Executor, runs: Sequence[SweepRun]) -> None:
    """Run those of the runs that are pending."""
    left = len(pending)
    function = partial(execute, str(PROGRAM))
    for run in executor.as_completed(function, pending, on_error=_ended):
        left -= 1
        open_parents(run.metrics_file, os.path.dirname(run.folder))
        print(f"{run}: {outcome(run)}, {left} remaining", flush=True)
        keep_best_weights(runs)


def execute(program: str, run: SweepRun) -> NoReturn:
    """Become the program of a run, in a process of a job; the GPUs are those of its slot."""
    gpus = jobs.share_of_gpus(run.settings.run.gpus, *jobs.slot())
    settings = FinetuningSettings(*with_values(run.settings, {"gpus": gpus}))
    _, _, *flags = shlex.split(command_of(program, *settings))
    os.makedirs(run.folder, exist_ok=True)
    await_unlocked(run.results, LOCK_SECONDS)
    jobs.become_program([program, *flags], os.path.join(run.folder, "run.log"))


def _ended(run: SweepRun, error: BaseException) -> SweepRun:
    """Take a run whose program has ended, with any exit status."""
    if isinstance(error, WorkerKilledError):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, ProcessDiedError):
        raise error
    elif error.status < 0:  # of a signal: the log does not say why
        print(f"error: {run}: {error}", file=sys.stderr)
    return run


def outcome(run: SweepRun) -> str:
    """Return the score of a run, or the last line that a failed one printed."""
    metrics = run.metrics()
    if metrics is not None:
        return f"{metrics.best.score:.4f} in {metrics.seconds:g} s"
    log = os.path.join(run.folder, "run.log")
    lines: list[str] = []
    if os.path.exists(log):
        with open(log, encoding="utf-8", errors="replace") as handle:
            lines = [line for line in handle.read().split("\n") if line]
    return f"failed ({lines[-1] if lines else 'no output'})"


def keep_best_weights(runs: Sequence[SweepRun]) -> Optional[Path]:
    """Delete the weights of all finished runs but the best, the first of equals; return its folder.

    None where no run has finished.
    """
    scores = {
        Path(run.results): metrics.best.score
        for run in runs
        if (metrics := run.metrics()) and (Path(run.results) / "best.params").exists()
    }
    best = max(scores, key=scores.__getitem__, default=None)
    for folder in scores:
        if folder != best:
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            for name in ("best.json", "best.params"):
                (folder / name).unlink(missing_ok=True)
    return best


def remove_left_checkpoints(runs: Sequence[SweepRun]) -> None:
    """Delete the checkpoints of finished runs, which those leave that are killed at their end.

    But not of one that is deleting them now, on a machine that was lost.
    """
    for run in runs:
        if run.metrics() and checkpoint.steps(run.results):
            with suppress(UserError), lock_folder(run.results):
                checkpoint.remove_all(run.results)


# ---- the table -----------------------------------------------------------------------------------


def table(runs: Sequence[SweepRun]) -> list[SweepRow]:
    """Return one row per combination without its seed, best mean first."""
    groups: dict[tuple, list[RunMetrics]] = defaultdict(list)
    for run in runs:
        values = tuple((name, value) for name, value in run.hparams.items() if name != "seed")
        metrics = run.metrics()
        groups[values] += [] if metrics is None else [metrics]
    rows = [
        SweepRow(
            dict(values),
            [metrics.best.score for metrics in finished],
            float(sum(metrics.seconds for metrics in finished)),
        )
        for values, finished in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.mean if row.scores else np.inf)


def _cells(rows: Sequence[SweepRow]) -> tuple[list[str], list[list[str]]]:
    header = [*rows[0].values, "runs", "mean", "spread", "best", "seconds"]
    lines = []
    for row in rows:
        statistics = (row.mean, row.spread, max(row.scores, default=np.nan))
        shown = ["-" if np.isnan(value) else f"{value:.4f}" for value in statistics]
        values = [spelled(value) for value in row.values.values()]
        lines.append([*values, str(len(row.scores)), *shown, f"{row.seconds:.0f}"])
    return header, lines


def as_markdown(rows: Sequence[SweepRow]) -> str:
    """Return the table in Markdown."""
    return markdown_table(*_cells(rows))


def write_table(folder: str, rows: Sequence[SweepRow]) -> None:
    """Write sweep.tsv and sweep.md."""
    header, lines = _cells(rows)
    tabs = "".join("\t".join(cells) + "\n" for cells in (header, *lines))
    for name, text in (("sweep.tsv", tabs), ("sweep.md", as_markdown(rows))):
        with atomic_write(os.path.join(folder, name)) as handle:
            handle.write(text)
    write_sums(folder, ["sweep.tsv", "sweep.md"])
