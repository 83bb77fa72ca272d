"""The training runs of a search: their keys, their errors, where they run and are recorded."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from bort.errors import UserError, quoted
from bort.jobs import CapExceededError, Executor, OverTimeError, Processes
from bort.journal import Journal, first_record
from bort.types import Hyperparameters, JSONMapping

Architecture = Any  # a tuple of plain values; a named one, such as Shape, keeps its names
SurrogateError = Callable[[Architecture, int, Hyperparameters, np.random.Generator], float]

JOURNAL_FORMAT = 2
TIME_CAP, MEMORY_CAP = "time cap", "memory cap"
# Why a candidate has no finite error; "": it has one.
FAILURES = ("", "diverged", TIME_CAP, MEMORY_CAP)


def name_of(architecture: Architecture) -> str:
    """Return the name of an architecture for messages; a tuple without one is shown as it is."""
    return str(getattr(architecture, "name", architecture))


class Candidate(NamedTuple):
    """One training run: an architecture, a set of hyperparameters, the number of the repeat."""

    number: int  # index among the candidates of the search
    architecture: Architecture
    hparams: Hyperparameters
    repeat: int


class Measurement(NamedTuple):
    """The error of a candidate; infinite where it failed."""

    number: int  # of the candidate
    error: float
    seconds: float
    failure: str  # one of FAILURES


class CapError(Exception):
    """Raised by a `surrogate_error` whose candidate exceeds the named cap, one of FAILURES."""


Map = Callable[[Callable[[Candidate], Measurement], Sequence[Candidate]], Iterable[Measurement]]


@dataclass(frozen=True)
class Evaluator:
    """Measures candidates; the function that a `Map` calls."""

    surrogate_error: SurrogateError
    max_steps: int
    seed: int

    def key(self, candidate: Candidate) -> str:
        """Return the text that names the candidate in a journal."""
        return self._text(candidate, steps=self.max_steps)

    def _text(self, candidate: Candidate, **more: int) -> str:
        named = {
            "architecture": list(candidate.architecture),
            "theta": dict(candidate.hparams),
            "repeat": candidate.repeat,
            "seed": self.seed,
        }
        return json.dumps({**named, **more}, sort_keys=True, default=_plain)

    def __call__(self, candidate: Candidate) -> Measurement:
        """Measure the candidate; an error that is not finite becomes infinity.

        The random generator does not depend on the number of steps.
        """
        digest = hashlib.sha256(self._text(candidate).encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        start = time.perf_counter()
        error, failure = math.inf, "diverged"
        try:
            value = float(
                self.surrogate_error(
                    candidate.architecture, self.max_steps, candidate.hparams, generator
                )
            )
            if math.isfinite(value):
                error, failure = value, ""
        except CapError as exceeded:
            failure = str(exceeded)
        return Measurement(candidate.number, error, time.perf_counter() - start, failure)


def _plain(value: Any) -> Any:
    """Return a number of NumPy as Python's, which is equal to it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{quoted(value)}: architectures and hyperparameters hold plain values")


# ---- where candidates run ------------------------------------------------------------------------


def executor_map(executor: Executor) -> Map:
    """Return a `Map` that runs candidates on an executor of `bort.jobs`.

    A candidate that exceeds a cap of the executor has an infinite error. One that raises ends the
    search; those that ended before it are in the journal.
    """

    def spread(
        function: Callable[[Candidate], Measurement], candidates: Sequence[Candidate]
    ) -> Iterator[Measurement]:
        # Side by side, the largest first: else one worker ends with it while others are idle.
        in_turn = candidates if executor.workers == 1 else candidates[::-1]
        yield from executor.as_completed(function, in_turn, on_error=_over_cap)

    return spread


def process_map(workers: int) -> Map:
    """Return a `Map` that runs each candidate in a process of its own, `workers` at once.

    The surrogate error has to be picklable: a function of a module, not a lambda.
    """

    def spread(
        function: Callable[[Candidate], Measurement], candidates: Sequence[Candidate]
    ) -> Iterator[Measurement]:
        with Processes(workers) as executor:
            yield from executor_map(executor)(function, candidates)

    return spread


def _over_cap(candidate: Candidate, error: BaseException) -> Measurement:
    if not isinstance(error, CapExceededError):
        raise error
    failure = TIME_CAP if isinstance(error, OverTimeError) else MEMORY_CAP
    return Measurement(candidate.number, math.inf, error.seconds, failure)


# ---- the journal ---------------------------------------------------------------------------------


class SearchJournal:
    """Measurements on disk, one JSON line each, so that an interrupted search can be resumed.

    `<folder>/journal-0.jsonl` begins with a line that describes the search. All journals of the
    folder are read: earlier versions wrote one for each rank. Damaged lines are reported and moved
    aside (see `bort.journal`); their candidates are measured again. Without its first line a
    journal cannot be attributed to a search and is moved aside as a whole.

    Raises `UserError` when a file belongs to another search.
    """

    def __init__(self, folder: str, description: JSONMapping) -> None:
        os.makedirs(folder, exist_ok=True)
        self.header = {"format": JOURNAL_FORMAT, "search": dict(description)}
        self.known: dict[str, Measurement] = {}
        path = os.path.join(folder, "journal-0.jsonl")
        for other in sorted(set(_journals(folder)) - {path}):
            self._read(other)
        self._journal = self._read(path)
        if not self._journal.records:
            self._journal.append(self.header)

    def _read(self, path: str) -> Journal:
        journal = Journal(path, _is_line)
        if journal.records and "search" not in journal.records[0]:
            journal.set_aside("the line that describes the search is damaged")
        for record in journal.records:
            if "search" in record:
                self._check_header(path, record)
            else:
                self.known[record["candidate"]] = _measurement(record)
        return journal

    def _check_header(self, path: str, header: Any) -> None:
        if header != json.loads(json.dumps(self.header)):
            raise UserError(
                f"{path}: was written by another search, {quoted(header)} where this one is "
                f"{quoted(self.header)}; give another folder"
            )

    def write(self, key: str, measurement: Measurement) -> None:
        """Append one measurement; it is on the disk when this returns."""
        self.known[key] = measurement
        content = {"candidate": key, **measurement._asdict()}
        del content["number"]
        if not math.isfinite(measurement.error):
            content["error"] = None
        self._journal.append(content)


def check_journals(folder: str, description: JSONMapping) -> None:
    """Raise `UserError` when a journal of the folder is of a search with other of these values.

    Before long work that a `SearchJournal` with the whole description would find in vain.
    """
    wanted = json.loads(json.dumps(dict(description)))
    for path in sorted(_journals(folder)):
        header = first_record(path)
        search = header.get("search") if isinstance(header, dict) else None
        if not isinstance(search, dict):  # damaged: `SearchJournal` moves it aside
            continue
        if differing := [name for name, value in wanted.items() if search.get(name) != value]:
            raise UserError(
                f"{path}: was written by another search, with other values of "
                f"{', '.join(differing)}; give another --output_dir"
            )


def has_journal(folder: str) -> bool:
    """Return whether a search has written its measurements into a folder."""
    return bool(_journals(folder))


def _journals(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "journal-*.jsonl"))


def _is_line(record: Any) -> bool:
    """Return whether a JSON value is the header or a measurement of a journal."""
    if "search" in record:
        return isinstance(record["search"], dict) and "format" in record
    _measurement(record)
    return isinstance(record["candidate"], str)


def _measurement(record: JSONMapping) -> Measurement:
    """Return the measurement of a line; its candidate's number is not known here: -1.

    Raises `ValueError` for values that no measurement has.
    """
    error, seconds = record["error"], record["seconds"]
    failure = FAILURES[FAILURES.index(record["failure"])]
    if (error is None) != bool(failure):
        raise ValueError(f"error {quoted(error)} with failure {failure!r}")
    if not failure and not _is_finite(error):  # below 0 is fine: see `lower_bound` of the search
        raise ValueError(f"error {quoted(error)}")
    if not (_is_finite(seconds) and seconds >= 0):
        raise ValueError(f"seconds {quoted(seconds)}")
    return Measurement(-1, math.inf if failure else float(error), float(seconds), failure)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
