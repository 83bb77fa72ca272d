"""Where a run reports: the screen, metrics.jsonl, TensorBoard, a progress bar; on rank 0 only."""

from __future__ import annotations

import os
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from typing import Iterator, Mapping, Protocol

import numpy as np

from bort.arrays import write_npz
from bort.communicator import Communicator
from bort.errors import UserError
from bort.files import atomic_write, lines_of, write_json
from bort.journal import line_of, record_of
from bort.progress import ProgressBar
from bort.types import JSONMapping, JSONObject

FILE = "metrics.jsonl"
CONFIG = "config.json"
NAME_WIDTH = 20  # of the closing table, unless a name is longer: dev_mismatched/accuracy
BOARD_SECONDS = 10.0  # between writes of TensorBoard's file to the disk


class Reporter(Protocol):
    """Where a run reports its metrics and messages."""

    def start(self, config: JSONMapping, step: int, max_steps: int, evaluate: bool = False) -> None:
        """Begin at `step`, or with `evaluate` before its evaluation; `config` are the settings."""

    def advance(self) -> None:
        """Move the progress bar by one step."""

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Record the values of one moment."""

    def say(self, line: str) -> None:
        """Print a line."""

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Save arrays in a file of the run's folder; returns its path."""

    def __enter__(self) -> Reporter: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


class NullReporter:
    """Reports nothing and writes nothing: for timings."""

    def start(self, config: JSONMapping, step: int, max_steps: int, evaluate: bool = False) -> None:
        """Ignore the settings."""

    def advance(self) -> None:
        """Show no progress."""

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Record nothing."""

    def say(self, line: str) -> None:
        """Print nothing."""

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Save nothing."""
        return os.devnull

    def __enter__(self) -> NullReporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close nothing."""


class FolderReporter:
    """Writes the metrics of a run to the screen and into its folder, on rank 0 alone.

    metrics.jsonl gets one JSON object per call of `log`, flushed at once, with `step`, `phase`, the
    values and the CRC-32 of the line. `start` cuts off lines beyond its step, which an earlier
    attempt has left: a resumed run reads like an uninterrupted one. With `quiet` nothing goes to
    the screen.
    """

    def __init__(self, folder: str, communicator: Communicator, quiet: bool = False) -> None:
        self._folder, self._communicator, self._quiet = folder, communicator, quiet
        self._path = os.path.join(folder, FILE)
        self._enabled = False

    def start(self, config: JSONMapping, step: int, max_steps: int, evaluate: bool = False) -> None:
        """Write config.json and open the files; the rank is asked for now: it may have changed."""
        self._enabled = self._communicator.rank == 0
        if not self._enabled:
            return
        os.makedirs(self._folder, exist_ok=True)
        write_json(os.path.join(self._folder, CONFIG), config)
        cut_after(self._path, step or -1, evaluate)
        with self._explained():
            self._lines = open(self._path, "ab")  # noqa: SIM115 (stays open)
            self._board = _Board(os.path.join(self._folder, "tensorboard"), step + 1)
        # Without lines: metric lines show the progress where there is no terminal.
        self._bar = ProgressBar(
            "", max_steps, "step", initial=step, enabled=not self._quiet, lines=False
        )

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._enabled:
            self._bar.advance()

    def log(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Record the values of one moment: a line, a JSON object, and TensorBoard scalars."""
        if not self._enabled:
            return
        record = {"step": step, "phase": phase, "time": round(time.time(), 3), **values}
        with self._explained():
            self._lines.write(line_of(record))
            self._lines.flush()
            self._board.add(step, {f"{phase}/{name}": value for name, value in values.items()})
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        self.say(f"step {step:>7}  {phase:<5} {shown}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled and not self._quiet:
            self._bar.write(line)

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Save arrays as an .npz file of the run's folder; returns its path, on every rank."""
        path = os.path.join(self._folder, name)
        if self._enabled:
            write_npz(path, arrays)
        return path

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: the metrics cannot be written ({error.strerror}); free some "
                "space and resume"
            ) from None

    def __enter__(self) -> FolderReporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the files; print the closing table of a run that did not fail."""
        if not self._enabled:
            return
        self._bar.close()
        for file in (self._lines, self._board):
            # After a failed write, closing fails again.
            with suppress(OSError) if kind else self._explained():
                file.close()
        if kind is None and not self._quiet:
            print(closing_table(self._path), flush=True)


class _Board:
    """TensorBoard's file of scalars, written by this thread.

    tensorboardX's SummaryWriter has a thread for it, and waits for that one forever once a write
    of it has failed, as on a full disk; and it needs shared memory, which some containers lack.
    """

    def __init__(self, folder: str, first_step: int) -> None:
        # Imported here: protobuf takes a while, and only rank 0 needs it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        os.makedirs(folder, exist_ok=True)
        self._events = EventsWriter(os.path.join(folder, "events"))
        # TensorBoard then hides what an earlier attempt wrote from this step on.
        start = SessionLog(status=SessionLog.START)
        self._write(step=first_step, session_log=start)
        self._flushed = time.monotonic()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add scalars by name."""
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))
        if time.monotonic() - self._flushed > BOARD_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._events.close()

    def _write(self, **content: object) -> None:
        self._events.write_event(self._event(wall_time=time.time(), **content))


def cut_after(path: str, step: int, evaluate: bool) -> None:
    """Keep the lines up to a step; with `evaluate` its evaluation is to come again.

    Lines of other programs are moved to a file beside it: they must not block a resume.
    """
    if not os.path.exists(path):
        return
    lines = lines_of(path)
    kept, foreign = [], []
    for line in lines:
        record = metric_record(line)
        if record is None:
            foreign.append(line)
        elif record["step"] < step or (
            record["step"] == step and not (evaluate and record["phase"] == "eval")
        ):
            kept.append(line)
    if foreign and foreign != lines[-1:]:  # a torn last line is that of a killed run
        with open(f"{path}.damaged", "ab") as file:
            file.writelines(foreign)
        print(
            f"warning: {path}: {len(foreign)} line(s) are not metrics; moved to {path}.damaged",
            file=sys.stderr,
        )
    with atomic_write(path, "wb") as handle:
        handle.writelines(kept)


def metric_record(line: bytes) -> JSONObject | None:
    """Return a metric line as a record; None for any other line and for a torn one."""
    try:
        record = record_of(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None
    step, phase = record.get("step"), record.get("phase")
    if isinstance(step, bool) or not isinstance(step, int) or not isinstance(phase, str):
        return None
    numbers = (value for name, value in record.items() if name != "phase")
    return record if all(map(_is_number, numbers)) else None


def _is_number(value: object) -> bool:
    # JSON's whole numbers may have any number of digits.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def read_records(path: str) -> list[JSONObject]:
    """Return the records of a metrics.jsonl; torn lines and those of other programs are skipped."""
    return [record for record in map(metric_record, lines_of(path)) if record is not None]


def _short(value: float) -> str:
    if float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:,.3f}"


def closing_table(metrics_path: str) -> str:
    """Return a summary of a run as a table: held-out metrics before and after, speed, shares.

    `metrics_path` is the run's metrics.jsonl.
    """
    records = read_records(metrics_path)
    evaluations = [record for record in records if record["phase"] == "eval"]
    training = [record for record in records if record["phase"] == "train"]
    rows: list[tuple[str, str, str]] = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        rows.append(("held out", f"step {first['step']}", "now"))
        rows += [
            (name, f"{first[name]:.4f}", f"{last[name]:.4f}")
            for name in _metric_names(last)
            if name in first
        ]
    speeds = [record["tokens_per_second"] for record in training if "tokens_per_second" in record]
    if speeds:
        rows.append(("tokens/s (median)", "", f"{statistics.median(speeds):,.0f}"))
        # A run that an earlier version began may have lines without.
        shares = dict.fromkeys(n for record in training for n in record if n.endswith("_share"))
        for name in shares:
            share = statistics.median(record[name] for record in training if name in record)
            rows.append((f"time: {name[: -len('_share')]}", "", f"{share:.1%}"))
    width = max((NAME_WIDTH, *(len(name) for name, _, _ in rows)))
    return "\n".join(f"{name:<{width}}{first:>12}{last:>12}" for name, first, last in rows)


def _metric_names(record: JSONObject) -> list[str]:
    return [name for name in record if name not in ("step", "phase", "time")]
