"""Runs damaged files through their readers, each batch in a forked child, and counts the outcomes.

A child is watched from outside: one that crashes, takes too long or too much memory costs only the
case it was at. Everything is drawn from (seed, format, number of the case), so that any case can
be run again alone.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from tests.fuzz.mutators import Damage, damage, flip_one_bit, restore
from tests.fuzz.sums import renew_sums

BATCH = 25  # cases in one child
CPU_SECONDS = 10.0  # of one case
WALL_SECONDS = 60.0
MEGABYTES = 1500  # that one case may add
LONGEST_LINE = 1000  # characters of a message
FILE_BYTES = 256 << 20
PASSED = ("clean error", "handled")
OUTCOMES = (*PASSED, "traceback", "crash", "hang", "accepted wrongly", "leftovers")


class WrongValueError(Exception):
    """A reader returned something that no valid file holds."""


class Noticed(str):
    """What a reader returns that has seen the damage and made do without the file."""


@dataclass(frozen=True)
class Format:
    """One format and its reader.

    make: writes a valid sample into an empty folder.
    read: reads the sample in a folder and returns plain values and arrays; raises
        `WrongValueError` when what a reader returned cannot be right.
    files: globs of the files that are damaged.
    checksummed: globs of the files that a checksum covers: reading them changed is always wrong.
    share: cases, relative to those of other formats.
    has_sums: it carries checksums, so that flipped bits are looked for.
    writes: the reader may write into the sample.
    renews: the checksums in the sample are those of the damaged file.
    shares: the format whose sample it shares; empty for its own.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: Sequence[str] = ("**/*",)
    checksummed: Sequence[str] = ()
    share: float = 1.0
    writes: bool = False
    has_sums: bool = False
    renews: bool = False
    shares: str = ""

    @property
    def sample(self) -> str:
        """Return the name of the folder of its sample."""
        return self.shares or self.name


class Case(NamedTuple):
    """What became of one case."""

    format: str
    number: int
    damage: Damage
    outcome: str
    detail: str


@dataclass
class Tally:
    """The outcomes of one format."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    # By file, and "noticed", "equal" or "no".
    flips: collections.Counter = field(default_factory=collections.Counter)
    problems: List[Case] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Count one case."""
        self.counts[case.outcome] += 1
        if case.damage.kind == "flip_bit":
            noticed = case.outcome == "clean error" or case.detail == "noticed"
            effect = "noticed" if noticed else "equal" if case.detail == "equal" else "no"
            self.flips[kind_of_file(case.damage.file), effect] += 1
        if case.outcome not in PASSED:
            self.problems.append(case)


def kind_of_file(name: str) -> str:
    """Return the name of a file without its folder and without numbers and sums in it."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "#", name.rpartition("/")[2])


# ---- one case ------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a SHA-256 over plain values and arrays."""
    total = hashlib.sha256()
    _update(total, value)
    return total.hexdigest()


def _update(total: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        total.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        for key in value:
            _update(total, (key, value[key]))
    elif isinstance(value, (list, tuple)):
        total.update(f"[{len(value)}".encode())
        for one in value:
            _update(total, one)
    else:
        total.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "surrogatepass"))


class CaseRunner:
    """A copy of a sample, damaged and restored case by case."""

    def __init__(self, form: Format, samples: Samples, seed: int, work: Path) -> None:
        self.form, self.work, self.seed = form, work, seed
        self.sample = samples.folder / form.sample
        self.reference = samples.reference[form.sample]
        self.damage = samples.damage
        sample = self.sample
        self.files = files_of(form, sample)
        self._renew()

    def _renew(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.sample, self.work, symlinks=True)

    def run(self, number: int, keep: bool = False) -> Case:
        """Damage, read, classify and restore; with `keep` the damaged sample stays."""
        generator = random.Random(f"{self.seed} {self.form.name} {number}")
        name = generator.choice(self.files)
        path = self.work / name
        done = self.damage(generator, path, self.work)
        if self.form.renews:
            renew_sums(self.work, self.sample, name)
        before = set(_paths(self.work))
        outcome, detail = self._outcome(name)
        left = [one for one in set(_paths(self.work)) - before if not self._is_output(one)]
        if left and outcome in PASSED:
            outcome, detail = "leftovers", ", ".join(sorted(left))
        if keep:
            return Case(self.form.name, number, done, outcome, detail)
        if self.form.writes or self.form.renews or left:
            self._renew()
        else:
            restore(path, self.sample / name)
        return Case(self.form.name, number, done, outcome, detail)

    def _is_output(self, path: str) -> bool:
        if path.endswith("/.verified.json"):  # what was verified, and when
            return True
        temporary = ".tmp" in path or path.endswith((".lock", ".part", ".partial"))
        return self.form.writes and not temporary

    def _outcome(self, name: str) -> tuple[str, str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = self.form.read(self.work)
        except BaseException as error:
            return _outcome_of_error(error)
        if isinstance(value, Noticed):
            return "handled", "noticed"
        if digest(value) == self.reference:
            return "handled", "equal"
        if any(Path(name).match(pattern) for pattern in self.form.checksummed):
            return "accepted wrongly", f"another value from {Path(name).name}, which has a checksum"
        return "handled", ""


def _outcome_of_error(error: BaseException) -> tuple[str, str]:
    text = str(error)
    if isinstance(error, WrongValueError):
        return "accepted wrongly", text
    clean = isinstance(error, UserError)
    # What `entry_point` makes one line of, too.
    clean = clean or (isinstance(error, OSError) and error.filename is not None)
    if clean and len(text) <= LONGEST_LINE and "\n" not in text:
        return "clean error", text
    where = next(
        (f"{Path(one.filename).name}:{one.lineno}"
         for one in reversed(traceback.extract_tb(error.__traceback__))
         if "site-packages" not in one.filename and "/tests/" not in one.filename),
        "?",
    )  # fmt: skip
    if clean:
        return "traceback", f"{where}: a message of {len(text)} characters: {text[:80]!r}"
    if isinstance(error, MemoryError):
        return "hang", f"{where}: MemoryError"
    return "traceback", f"{where}: {type(error).__name__}: {' '.join(text.split())[:120]}"


def files_of(form: Format, sample: Path) -> List[str]:
    """Return the files of a sample that are damaged, in order."""
    found = {path for pattern in form.files for path in sample.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(sample)) for path in found)


def _paths(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield os.path.relpath(os.path.join(place, name), folder)


# ---- children ------------------------------------------------------------------------------------


class _Child:
    """A forked child that runs a list of cases and reports each by a line."""

    def __init__(self, make_runner: Callable[[], CaseRunner], numbers: Sequence[int]) -> None:
        self.waiting = list(numbers)
        self.cases: List[Case] = []
        self.descriptor, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.descriptor)
            _run_child(make_runner, numbers, writer)
        os.close(writer)
        self._rest = b""
        self._base = _resident(self.pid)
        self._begin()
        self.status: Optional[int] = None
        self.ended = ""

    def _begin(self) -> None:
        self._seconds, self._looked = 0.0, time.monotonic()
        self._cpu = _cpu_seconds(self.pid)

    def read(self) -> None:
        """Take what has been reported."""
        piece = os.read(self.descriptor, 1 << 16)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            name, number, done, outcome, detail = json.loads(line)
            self.cases.append(Case(name, number, Damage(*done), outcome, detail))
            self.waiting.remove(number)
            self._begin()
        if not piece:
            os.close(self.descriptor)
            _, self.status = os.waitpid(self.pid, 0)

    def watch(self) -> None:
        """End the child when its case takes too long or too much."""
        now = time.monotonic()
        # No more than a second at a time: this process may have been stopped itself.
        self._seconds, self._looked = self._seconds + min(1.0, now - self._looked), now
        if self._seconds > WALL_SECONDS:
            self._kill(f"{WALL_SECONDS:g} s without an end")
        elif _cpu_seconds(self.pid) - self._cpu > CPU_SECONDS:
            self._kill(f"{CPU_SECONDS:g} s of computation")
        elif _resident(self.pid) - self._base > MEGABYTES:
            self._kill(f"{MEGABYTES} MB")

    def _kill(self, why: str) -> None:
        self.ended = why
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _run_child(make_runner: Callable[[], CaseRunner], numbers: Sequence[int], writer: int) -> None:
    faulthandler.disable()  # which pytest has switched on
    try:
        _silence()
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        runner = make_runner()
        for number in numbers:
            case = runner.run(number)
            os.write(writer, json.dumps(case).encode() + b"\n")
    finally:
        os._exit(0)


def _resident(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize() / 1e6
    return 0.0


def _cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


# ---- all cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Valid samples, and the digest of what their readers return."""

    folder: Path
    reference: Dict[str, str]
    damage: Callable[[random.Random, Path, Path], Damage] = damage

    def runner(self, form: Format, seed: int, work: Path) -> CaseRunner:
        """Return what runs the cases of one format."""
        return CaseRunner(form, self, seed, work)


def make_samples(
    formats: Sequence[Format], folder: Path, jobs: int = 1, flips: bool = False
) -> Samples:
    """Write a sample of each format, and read it: a reader that refuses it is of no use here.

    In children, `jobs` at a time: this process stays without threads. With `flips` every damage
    is one flipped bit.
    """
    reference: Dict[str, str] = {}
    waiting, running = list({form.sample: form for form in formats}.values()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            form = waiting.pop()
            place = folder / form.sample
            place.mkdir(parents=True)
            reader, pid = start_child(lambda f=form, p=place: _made(f, p))
            running[reader] = form.sample, pid
        for reader in select.select(list(running), [], [])[0]:
            name, pid = running.pop(reader)
            reference[name] = result_of(reader, pid, name)
    return Samples(folder, reference, flip_one_bit if flips else damage)


def _made(form: Format, place: Path) -> str:
    warnings.simplefilter("ignore")
    form.make(place)
    copy = place.with_name(f"{place.name}.read")
    shutil.copytree(place, copy, symlinks=True)
    found = digest(form.read(copy))
    shutil.rmtree(copy)
    return found


def start_child(function: Callable[[], str]) -> tuple[int, int]:
    """Call a function in a forked child; returns where its text can be read, and the process."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _silence()
            os.write(writer, b"+" + function().encode())
        except BaseException:  # the parent shows it
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    return reader, pid


def result_of(reader: int, pid: int, name: str) -> str:
    """Wait for the text of a child; raises `AssertionError` with its traceback when it failed."""
    with open(reader, "rb") as stream:
        result = stream.read().decode()
    os.waitpid(pid, 0)
    if not result.startswith("+"):
        reason = result or "the process crashed"
        raise AssertionError(f"{name}: the valid sample is refused:\n{reason}")
    return result[1:]


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def shares(formats: Sequence[Format], cases: int) -> Dict[str, int]:
    """Return how many of the cases each format gets: at least one."""
    total = sum(form.share for form in formats)
    return {form.name: max(1, round(cases * form.share / total)) for form in formats}


def run(
    formats: Sequence[Format], samples: Samples, cases: int, seed: int, jobs: int, work: Path
) -> Dict[str, Tally]:
    """Run the cases of all formats, `jobs` children at a time."""
    tallies = {form.name: Tally() for form in formats}
    queue: collections.deque = collections.deque()
    counts = shares(formats, cases)
    for form in formats:
        numbers = range(counts[form.name])
        queue += [(form, list(numbers[i : i + BATCH])) for i in range(0, len(numbers), BATCH)]
    running: Dict[int, tuple[Format, _Child]] = {}
    while queue or running:
        while queue and len(running) < jobs:
            form, numbers = queue.popleft()
            place = Path(tempfile.mkdtemp(dir=work)) / "sample"
            child = _Child(lambda f=form, p=place: samples.runner(f, seed, p), numbers)
            running[child.descriptor] = form, child
        ready, _, _ = select.select(list(running), [], [], 0.05)
        for descriptor in ready:
            running[descriptor][1].read()
        for descriptor, (form, child) in list(running.items()):
            if child.status is None:
                child.watch()
                continue
            del running[descriptor]
            for case in child.cases:
                tallies[form.name].add(case)
            _record_end(form, child, samples, seed, tallies[form.name], queue)
    return tallies


def _record_end(
    form: Format, child: _Child, samples: Samples, seed: int, tally: Tally, queue: Any
) -> None:
    """Record the case at which a child ended, and queue the rest for another child."""
    if not child.waiting:
        return
    number, *rest = child.waiting
    outcome = "hang" if child.ended else "crash"
    status = os.waitstatus_to_exitcode(child.status or 0)
    tally.add(Case(form.name, number, described(form, samples, seed, number), outcome,
                   child.ended or f"the process ended with status {status}"))  # fmt: skip
    if rest:
        queue.append((form, rest))


def described(form: Format, samples: Samples, seed: int, number: int) -> Damage:
    """Return what a case does, without reading it."""
    generator = random.Random(f"{seed} {form.name} {number}")
    name = generator.choice(files_of(form, samples.folder / form.sample))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(samples.folder / form.sample / name, path)
        return samples.damage(generator, path, Path(folder))


# ---- the table -----------------------------------------------------------------------------------


def table(tallies: Dict[str, Tally]) -> str:
    """Return the outcomes by format, and the share of flipped bits that were noticed."""
    header = ["format", "cases", *OUTCOMES, "passed", "flips noticed"]
    rows = [[name, *_cells(tally)] for name, tally in tallies.items()]
    total = Tally()
    for tally in tallies.values():
        total.counts.update(tally.counts)
        total.flips.update(tally.flips)
    return columns([header, *rows, ["all", *_cells(total)]])


def _cells(tally: Tally) -> List[str]:
    cases = sum(tally.counts.values())
    passed = sum(tally.counts[name] for name in PASSED)
    share = f"{100 * passed / cases:.1f} %" if cases else "-"
    return [
        f"{cases:,}",
        *(str(tally.counts[name]) for name in OUTCOMES),
        share,
        _noticed(tally.flips),
    ]


def _noticed(flips: collections.Counter) -> str:
    """Return noticed/all; a flip that changes nothing that is read has no effect to notice."""
    counts: collections.Counter = collections.Counter()
    for (_, effect), number in flips.items():
        counts[effect] += number
    return f"{counts['noticed']}/{counts['noticed'] + counts['no']}"


def flip_table(tallies: Dict[str, Tally]) -> str:
    """Return by format and file how many flipped bits were noticed, and how many had no effect."""
    rows = [["format", "file", "bits", "no effect", "noticed", "unnoticed"]]
    for name, tally in tallies.items():
        for file in sorted({file for file, _ in tally.flips}):
            equal, noticed, missed = (tally.flips[file, a] for a in ("equal", "noticed", "no"))
            rows.append([name, file, str(equal + noticed + missed), str(equal), str(noticed),
                         str(missed)])  # fmt: skip
    rows.append(["all", "", *(str(sum(int(row[i]) for row in rows[1:])) for i in range(2, 6))])
    return columns(rows, 2)


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows of cells as text: the first `left` columns to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )  # fmt: skip


def problems(tallies: Dict[str, Tally], most: int = 100) -> List[str]:
    """Return the distinct problems, most frequent first: outcome, format, detail, an example."""
    groups: Dict[tuple, List[Case]] = collections.defaultdict(list)
    for tally in tallies.values():
        for case in tally.problems:
            groups[case.outcome, case.format, _kind_of(case)].append(case)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        f"{len(cases):>5} x {outcome}, {name}: {cases[0].detail} "
        f"[{cases[0].damage.kind} of {cases[0].damage.file}, --case {cases[0].number}]"
        for (outcome, name, _), cases in ordered[:most]
    ]


def _kind_of(case: Case) -> str:
    return case.detail.partition(":")[0] + ":".join(case.detail.split(":")[1:3])
