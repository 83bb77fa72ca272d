"""A sweep: one fine-tuning run for each set of a search space, several at a time, and their table.

    <output_dir>/<task>-sweep/sweep.json                     the flags that all runs share
                              lr=0.0001,seed=0/run.log       what a run printed
                              lr=0.0001,seed=0/<task>/       its results, as of any run
                              sweep.tsv, sweep.md            the table

Only the best run keeps its weights: others' would fill a disk.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import numpy as np

from bort.config import as_dict, command_of, option, required
from bort.errors import UserError
from bort.files import read_json, write_json
from bort.finetuning.config import FinetuningSettings
from bort.finetuning.search_space import read_space, with_values
from bort.mxnet_setup import usable_cores
from bort.tokenization import TOKENIZER_FOLDER
from bort.types import Hyperparameters
from data.tasks import get_task

PROGRAM = Path(__file__).resolve().parents[2] / "finetune_classifier.py"
POLL = 0.1  # seconds between looks at the running programs


@dataclass(frozen=True)
class SweepSettings:
    """Which sets are tried, and how many at a time."""

    grid: str = required("YAML file: flags that are numbers, each with the list of its values")
    jobs: int = option(
        1, "runs at a time; each has its share of the cores, and of --gpus", minimum=1
    )


class Trial(NamedTuple):
    """A set, the settings of its run, and the run's folder, which has the task's folder in it."""

    theta: Hyperparameters
    settings: FinetuningSettings
    folder: str

    @property
    def results(self) -> str:
        """Return the folder of the run's results."""
        return os.path.join(self.folder, get_task(self.settings.task.task_name).name)

    def metrics(self) -> Optional[dict[str, Any]]:
        """Return the content of metrics.json, None before the run has ended."""
        path = os.path.join(self.results, "metrics.json")
        return read_json(path) if os.path.exists(path) else None


class Row(NamedTuple):
    """A set without its seed, and what its runs with different seeds reached and took.

    scores: the task's figure on the dev sets, 0 to 1, one per run that has ended.
    """

    values: Hyperparameters
    scores: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean over the seeds, NaN before any run has ended."""
        return float(np.mean(self.scores)) if self.scores else np.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds, NaN for fewer than two."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else np.nan


def sweep(settings: SweepSettings, base: FinetuningSettings) -> list[Row]:
    """Run every set that has not ended before; returns the table, best mean first.

    Runs that failed leave the others alone. Raises `UserError` for them at the end, and for a
    folder that holds a sweep with other flags.
    """
    folder = os.path.join(base.run.output_dir, f"{get_task(base.task.task_name).name}-sweep")
    trials = trials_of(settings, base, folder)
    claim(folder, base, trials[0].theta)
    pending = [trial for trial in trials if trial.metrics() is None]
    print(f"{folder}: {len(trials)} runs, {len(trials) - len(pending)} of them ended before")
    run_all(pending, settings.jobs, trials)
    rows = table(trials)
    write_table(folder, rows)
    print(as_markdown(rows), end="")
    failed = [trial.folder for trial in trials if trial.metrics() is None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(trials)} runs failed, {failed[0]} first: see its run.log; the "
            "same command tries them again"
        )
    return rows


def trials_of(settings: SweepSettings, base: FinetuningSettings, folder: str) -> list[Trial]:
    """Return one trial for each set of the grid. Raises `UserError` for a grid that is none."""
    base.check()
    if base.run.only_inference:
        raise UserError("--only_inference: a sweep trains")
    trials = []
    for theta in read_space(settings.grid, base.classifier, base.optimizer, base.run):
        own = os.path.join(folder, ",".join(f"{name}={value:g}" for name, value in theta.items()))
        chosen = with_values(base, {**theta, "output_dir": own, "resume": True})
        trials.append(Trial(theta, FinetuningSettings(*chosen), own))
    return trials


def claim(folder: str, base: FinetuningSettings, theta: Hyperparameters) -> None:
    """Note the flags that all runs share, or raise `UserError` when others have been noted."""
    free = {*theta, "resume", "gpus", "log_interval", "cache_dir"}
    shared = {
        name: value
        for group in as_dict(*base).values()
        for name, value in group.items()
        if name not in free
    }
    path = os.path.join(folder, "sweep.json")
    if os.path.exists(path):
        before = read_json(path)
        changed = [name for name in {**before, **shared} if before.get(name) != shared.get(name)]
        if changed:
            raise UserError(
                f"{folder}: holds a sweep with another {', '.join(f'--{one}' for one in changed)}; "
                "another --output_dir starts anew"
            )
    os.makedirs(folder, exist_ok=True)
    write_json(path, shared)


def run_all(pending: Sequence[Trial], jobs: int, trials: Sequence[Trial]) -> None:
    """Run those of the trials that are pending, at most `jobs` at a time.

    When interrupted, the runs save and end first.
    """
    waiting = list(reversed(pending))
    running: dict[int, tuple[Trial, subprocess.Popen]] = {}
    with _exit_on_sigterm(), _ended(running):
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    trial = waiting.pop()
                    running[slot] = trial, start(trial, slot, jobs)
            time.sleep(POLL)
            for slot, (trial, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    left = len(waiting) + len(running)
                    print(
                        f"{os.path.basename(trial.folder)}: {outcome(trial)}, {left} to go",
                        flush=True,
                    )
                    keep_best_weights(trials)


def start(trial: Trial, slot: int, jobs: int) -> subprocess.Popen:
    """Start the program of a trial, with the share of cores and GPUs that `slot` of `jobs` has."""
    settings = trial.settings
    if settings.run.gpus:
        gpus = settings.run.gpus.split(",")
        own = ",".join(gpus[slot::jobs]) or gpus[slot % len(gpus)]
        settings = FinetuningSettings(*with_values(settings, {"gpus": own}))
    words = shlex.split(command_of(PROGRAM.name, *settings))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    os.makedirs(trial.folder, exist_ok=True)
    with open(os.path.join(trial.folder, "run.log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *words[2:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ended(running: dict[int, tuple[Trial, subprocess.Popen]]) -> Iterator[None]:
    """Let the programs that still run save what they have and end."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def outcome(trial: Trial) -> str:
    """Return what a run came to, in words: its score, or the last line that it printed."""
    metrics = trial.metrics()
    if metrics is not None:
        return f"{metrics['best']['score']:.4f} in {metrics['seconds']:g} s"
    with open(os.path.join(trial.folder, "run.log"), encoding="utf-8", errors="replace") as log:
        lines = log.read().split("\n")
    return f"failed ({next((line for line in reversed(lines) if line), 'without a word')})"


def keep_best_weights(trials: Sequence[Trial]) -> None:
    """Delete the weights of all ended runs but the one with the best score, the first of equals."""
    ended = [(Path(trial.results), trial.metrics()) for trial in trials]
    scores = {
        folder: metrics["best"]["score"]
        for folder, metrics in ended
        if metrics is not None and (folder / "best.params").exists()
    }
    best = max(scores, key=scores.__getitem__, default=None)
    for folder in scores:
        if folder != best:
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            for name in ("best.json", "best.params"):
                (folder / name).unlink(missing_ok=True)


# ---- the table ----------------------------------------------------------------------------------


def table(trials: Sequence[Trial]) -> list[Row]:
    """Return one row per set, runs that differ in the seed alone together, best mean first."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        values = tuple((name, value) for name, value in trial.theta.items() if name != "seed")
        metrics = trial.metrics()
        groups[values] += [] if metrics is None else [metrics]
    rows = [
        Row(
            dict(values),
            [one["best"]["score"] for one in ended],
            float(sum(one["seconds"] for one in ended)),
        )
        for values, ended in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.mean if row.scores else np.inf)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    header = [*rows[0].values, "runs", "mean", "spread", "best", "seconds"]
    lines = []
    for row in rows:
        figures = (row.mean, row.spread, max(row.scores, default=np.nan))
        shown = ["-" if np.isnan(one) else f"{one:.4f}" for one in figures]
        values = [f"{value:g}" for value in row.values.values()]
        lines.append([*values, str(len(row.scores)), *shown, f"{row.seconds:.0f}"])
    return [header, *lines]


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    header, *lines = _cells(rows)
    return "".join(
        f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines)
    )


def write_table(folder: str, rows: Sequence[Row]) -> None:
    """Write sweep.tsv and sweep.md."""
    tabs = "".join("\t".join(cells) + "\n" for cells in _cells(rows))
    for name, text in (("sweep.tsv", tabs), ("sweep.md", as_markdown(rows))):
        path = os.path.join(folder, name)
        with open(f"{path}.tmp", "w", encoding="utf-8") as handle:
            handle.write(text)
        os.replace(f"{path}.tmp", path)
