"""OSE: the approximation scheme for optimal subarchitecture extraction, for any family of networks.

An Approximation Algorithm for Optimal Subarchitecture Extraction (arXiv 2010.08512). From a space
of architectures it extracts the one with the largest W-coefficient: small, fast and accurate in
comparison with the maximum point T, the largest member. Size and speed are closed forms of the
architectural parameters; only the error needs training, and only a bounded number of steps.

From the paper, as its abstract and accounts of it by others have it: the three measures, T, the
W-coefficient, one visit every `stride` positions of the ordered space, the best over all sets of
hyper-parameters. Where they are silent the choices are ours:

- The order: size, inference cost, `tie_break`, all ascending. Positions 0, stride, 2 * stride, ...
  are visited.
- T, and any other member with W = 0 whatever its error, is listed but not trained.
- An error below `MINIMUM_ERROR` counts as that much; one that is not finite (a diverged run, a
  broken cap on time or memory) gives W = 0, and the table says why.
- Repeated seeds are averaged before W is taken; ties go to the smaller model, the earlier one.
- A candidate's random generator is keyed by seed, architecture, hyper-parameters and repeat, so its
  error depends neither on the stride nor on the place where it is trained.
- The quality: the paper's rho <= |1 - stride| is read as W_best / W_found - 1 <= stride - 1, hence
  W_found >= W_best / stride. It presumes an error that is smooth along the order.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from bort.errors import UserError
from bort.jobs import die_with_parent
from bort.mxnet_setup import cpu_threads, usable_cores
from bort.types import Hyperparameters

Architecture = Any  # a tuple of plain values; a named one, as Shape, keeps its names
Measure = Callable[[Any], int]
SurrogateError = Callable[[Any, int, Hyperparameters, np.random.Generator], float]

MINIMUM_ERROR = 1e-7
JOURNAL_FORMAT = 2
# Why a candidate has no finite error; the empty one: it has. Ranks send one another the number.
FAILURES = ("", "diverged", "time cap", "memory cap")
# What a hyper-parameter set holds besides the values of the grid, for `surrogate_error` to follow.
# The guarantee needs SGD over a compact set of weights; BERT is trained by Adam in practice.
MODES: Mapping[str, Hyperparameters] = {
    "theory": {"optimizer": "sgd", "weight_bound": 1.0},
    "practical": {"optimizer": "bertadam"},
}


class Member(NamedTuple):
    """One architecture of the space with its closed forms."""

    architecture: Architecture
    size: int  # parameters
    cost: int  # operations of one inference


class Candidate(NamedTuple):
    """One training run: an architecture, a hyper-parameter set, and the number of the repeat."""

    number: int  # place among the candidates of the search
    architecture: Architecture
    theta: Hyperparameters
    repeat: int


class Outcome(NamedTuple):
    """What training a candidate came to."""

    error: float
    seconds: float
    failure: str  # one of FAILURES


class Measurement(NamedTuple):
    """What came of which candidate."""

    number: int
    outcome: Outcome
    fresh: bool  # measured by this process now: goes into its journal


class CapError(Exception):
    """Raised by a `surrogate_error` whose candidate breaks the cap named, one of FAILURES."""


Map = Callable[[Callable[[Candidate], Measurement], Sequence[Candidate]], Iterable[Measurement]]


@dataclass(frozen=True)
class Row:
    """One line of the table: an architecture with one hyper-parameter set."""

    position: int  # in the ordered space
    architecture: Architecture
    theta: Hyperparameters
    size: int
    cost: int
    gain: float  # the size-and-speed part of W
    errors: tuple[float, ...]  # one for each repeat; empty when the gain is 0
    error: float | None  # their mean
    failure: str  # why it is not finite, of the first such repeat; one of FAILURES
    w: float
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class OseResult:
    """The row that won, everything that was visited in order, and what it was compared with."""

    best: Row
    table: tuple[Row, ...]
    maximum_point: Member
    space_size: int


def size_and_speed_gain(member: Member, maximum_point: Member) -> float:
    """Return |(p(T) - p) / p(T)| * |(i(T) - i) / i(T)|, the part of W that needs no training."""
    size = abs((maximum_point.size - member.size) / maximum_point.size)
    return size * abs((maximum_point.cost - member.cost) / maximum_point.cost)


def w_coefficient(member: Member, maximum_point: Member, error: float) -> float:
    """Return W = gain / error: 0 for T itself, larger for smaller, faster, more accurate networks.

    Raises `ValueError` for a negative error.
    """
    if error < 0:
        raise ValueError(f"error {error} of {member.architecture}: must not be negative")
    if not math.isfinite(error):
        return 0.0
    return size_and_speed_gain(member, maximum_point) / max(error, MINIMUM_ERROR)


def ordered(
    space: Iterable[Architecture],
    parameter_size: Measure,
    inference_cost: Measure,
    tie_break: Callable[[Any], Any] = tuple,
) -> list[Member]:
    """Return the distinct members of the space in the order in which the search counts them.

    Raises `UserError` for an empty space.
    """
    members = [Member(a, parameter_size(a), inference_cost(a)) for a in set(space)]
    if not members:
        raise UserError("the search space is empty: give at least one architecture")
    return sorted(members, key=lambda m: (m.size, m.cost, tie_break(m.architecture)))


def largest(members: Sequence[Member]) -> Member:
    """Return the maximum point T of ordered members: most parameters, then highest cost."""
    return max(reversed(members), key=lambda m: (m.size, m.cost))


def hyperparameter_sets(mode: str = "practical", **grid: Sequence[Any]) -> list[dict[str, Any]]:
    """Return Theta: the mode's settings with every combination of the values of the grid.

    Raises `UserError` for a mode that is not in `MODES`.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: must be one of {', '.join(MODES)}")
    combinations = itertools.product(*grid.values())
    return [{**MODES[mode], **dict(zip(grid, values))} for values in combinations]


def extract(
    space: Iterable[Architecture],
    parameter_size: Measure,
    inference_cost: Measure,
    surrogate_error: SurrogateError,
    maximum_point: Architecture | None = None,
    stride: int = 1,
    max_steps: int = 200,
    *,
    thetas: Sequence[Hyperparameters] = ({},),
    repeats: int = 1,
    seed: int = 0,
    tie_break: Callable[[Any], Any] = tuple,
    map: Map = map,
    journal: Journal | None = None,
) -> OseResult:
    """Visit every `stride`-th member of the ordered space; return the one of the largest W.

    Args:
        space: architectures, tuples of plain values.
        parameter_size: closed form p, the number of parameters.
        inference_cost: closed form i, the operations that answer one input.
        surrogate_error: (architecture, steps, theta, generator) -> error, of a network trained
            for that many steps with those hyper-parameters. It has to be picklable for
            `process_map`; for a candidate that cannot be measured it may return infinity or
            raise `CapError`.
        maximum_point: T; default the largest member of the space.
        stride: the interval; 1 visits everything.
        max_steps: the limit of training, handed to `surrogate_error`.
        thetas: sets of hyper-parameters, each of plain JSON values.
        repeats: training runs to average, each with its own generator.
        seed: decides every draw.
        tie_break: orders members of equal size and cost.
        map: calls a function on every candidate and yields the measurements, in any order.
        journal: where measurements are kept as they come; those it holds are not made again.

    Raises:
        UserError: an empty space, a stride, number of repeats or hyper-parameter sets out of
            range, a T that is not the largest, or a search without any W above 0.
    """
    members = ordered(space, parameter_size, inference_cost, tie_break)
    if not 1 <= stride <= len(members):
        raise UserError(f"stride {stride}: must be from 1 to {len(members)}, the space's size")
    if repeats < 1 or not thetas:
        raise UserError("the search needs at least one repeat and one set of hyper-parameters")
    top = largest(members)
    if maximum_point is not None:
        top = Member(maximum_point, parameter_size(maximum_point), inference_cost(maximum_point))
    check_maximum_point(top, members)

    visited = members[::stride]
    trained = [m.architecture for m in visited if size_and_speed_gain(m, top) > 0]
    runs = itertools.product(trained, thetas, range(repeats))
    candidates = [Candidate(number, *run) for number, run in enumerate(runs)]
    trial = Trial(surrogate_error, max_steps, seed, dict(journal.known) if journal else {})
    found = _collect(map(trial, candidates), trial, candidates, journal)

    table = []
    for (place, member), theta in itertools.product(enumerate(visited), thetas):
        measured = [next(found) for _ in range(repeats)] if member.architecture in trained else []
        table.append(_row(place * stride, member, theta, top, measured))
    best = max(table, key=lambda row: row.w)
    if best.w == 0:
        raise UserError("no architecture visited has a W above 0: no error is finite, or all are T")
    return OseResult(best, tuple(table), top, len(members))


def check_maximum_point(top: Member, members: Sequence[Member]) -> None:
    """Raise `UserError` when a member exceeds T: W would reward it, as it takes absolute values."""
    beyond = [m for m in members if m.size > top.size or m.cost > top.cost]
    if beyond:
        raise UserError(
            f"maximum point {top.architecture}: {beyond[-1].architecture} has more parameters or "
            "operations; give a maximum point that no member exceeds"
        )


def _collect(
    measurements: Iterable[Measurement],
    trial: Trial,
    candidates: Sequence[Candidate],
    journal: Journal | None,
) -> Iterator[Measurement]:
    """Write the measurements down as they come; return them in the candidates' order."""
    found: dict[int, Measurement] = {}
    for measurement in measurements:
        found[measurement.number] = measurement
        if journal and measurement.fresh:
            journal.write(trial.key(candidates[measurement.number]), measurement)
    if len(found) < len(candidates):
        raise RuntimeError(f"map returned {len(found)} of {len(candidates)} measurements")
    return iter([found[candidate.number] for candidate in candidates])


def _row(
    position: int,
    member: Member,
    theta: Hyperparameters,
    top: Member,
    measured: Sequence[Measurement],
) -> Row:
    errors = tuple(m.outcome.error for m in measured)
    error = float(np.mean(errors)) if errors else None
    failures = [m.outcome.failure for m in measured if m.outcome.failure]
    return Row(
        position=position,
        architecture=member.architecture,
        theta=theta,
        size=member.size,
        cost=member.cost,
        gain=size_and_speed_gain(member, top),
        errors=errors,
        error=error,
        failure=failures[0] if failures else "",
        w=0.0 if error is None else w_coefficient(member, top, error),
        seconds=sum(m.outcome.seconds for m in measured),
    )


@dataclass(frozen=True)
class Trial:
    """The function a `map` calls: measures one candidate, unless its measurement is known."""

    surrogate_error: SurrogateError
    max_steps: int
    seed: int
    known: Mapping[str, Outcome]

    def key(self, candidate: Candidate) -> str:
        """Return the text that names the candidate in a journal; its draws do not know `steps`."""
        return self._text(candidate, steps=self.max_steps)

    def _text(self, candidate: Candidate, **more: int) -> str:
        named = {
            "architecture": list(candidate.architecture),
            "theta": dict(candidate.theta),
            "repeat": candidate.repeat,
            "seed": self.seed,
        }
        return json.dumps({**named, **more}, sort_keys=True)

    def __call__(self, candidate: Candidate) -> Measurement:
        """Measure the candidate; a NaN becomes infinity, so that measurements compare."""
        if self.key(candidate) in self.known:
            return Measurement(candidate.number, self.known[self.key(candidate)], fresh=False)
        digest = hashlib.sha256(self._text(candidate).encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        start = time.perf_counter()
        error, failure = math.inf, "diverged"
        try:
            given = float(
                self.surrogate_error(
                    candidate.architecture, self.max_steps, candidate.theta, generator
                )
            )
            if math.isfinite(given):
                error, failure = given, ""
        except CapError as broken:
            failure = str(broken)
        outcome = Outcome(error, time.perf_counter() - start, failure)
        return Measurement(candidate.number, outcome, fresh=True)


def process_map(workers: int) -> Map:
    """Return a `map` that spreads candidates over `workers` processes, each with its own cores.

    A candidate that raises ends the search; what the others had measured is in the journal.
    """

    def spread(
        function: Callable[[Candidate], Measurement], candidates: Sequence[Candidate]
    ) -> Iterator[Measurement]:
        """Yield the measurements in the order in which they end."""
        # A forked child would inherit MXNet's threads in a state that hangs.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, _limit_threads, (workers,))
        try:
            # The largest first: no worker is left with it at the end.
            waiting = [pool.submit(function, candidate) for candidate in reversed(candidates)]
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    return spread


def _limit_threads(workers: int) -> None:
    """The parent may have claimed all cores for itself when it imported MXNet."""
    die_with_parent()
    share = max(1, usable_cores() // workers)
    os.environ["OMP_NUM_THREADS"] = str(min(cpu_threads(), share))


def rank_map(rank: int, size: int, all_reduce_sum: Callable[[np.ndarray], np.ndarray]) -> Map:
    """Return a `map` for rank `rank` of `size`, under Horovod or any other collective.

    Rank r measures candidates r, r + size, ...; one sum over all ranks of a float64 array
    [candidates, 3] then gives everybody everything. Each rank keeps a journal of its own.
    """

    def spread(
        function: Callable[[Candidate], Measurement], candidates: Sequence[Candidate]
    ) -> Iterator[Measurement]:
        """Yield this rank's measurements as they come, then those of the others."""
        shared = np.zeros((len(candidates), len(Outcome._fields)))
        for candidate in candidates[rank::size]:
            measurement = function(candidate)
            error, seconds, failure = measurement.outcome
            shared[candidate.number] = error, seconds, FAILURES.index(failure)
            yield measurement
        shared = all_reduce_sum(shared)
        for candidate in candidates:
            if candidate.number % size != rank:
                error, seconds, failure = shared[candidate.number].tolist()
                outcome = Outcome(error, seconds, FAILURES[int(failure)])
                yield Measurement(candidate.number, outcome, fresh=False)

    return spread


class Journal:
    """Measurements on disk, one JSON line each, so that a killed search continues.

    `<folder>/journal-<rank>.jsonl` begins with a line that describes the search. Every rank reads
    all journals of the folder and writes its own. A last line cut by a kill is dropped.

    Raises `UserError` when a file belongs to another search or a line of it cannot be read.
    """

    def __init__(self, folder: str, description: Mapping[str, Any], rank: int = 0) -> None:
        os.makedirs(folder, exist_ok=True)
        self.description = dict(description)
        self.path = os.path.join(folder, f"journal-{rank}.jsonl")
        self.known: dict[str, Outcome] = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "journal-*.jsonl"))):
            self._read(path)
        self._open()

    def _read(self, path: str) -> None:
        with open(path, encoding="utf-8") as handle:
            lines = [line for line in handle if line.endswith("\n")]
        for number, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                if number == 1:
                    self._check_header(path, content)
                    continue
                error = math.inf if content["error"] is None else float(content["error"])
                failure = FAILURES[FAILURES.index(content["failure"])]
                self.known[content["candidate"]] = Outcome(
                    error, float(content["seconds"]), failure
                )
            except (ValueError, KeyError, TypeError) as problem:
                raise UserError(
                    f"{path}:{number}: is no measurement ({problem}); remove the line"
                ) from None

    def _check_header(self, path: str, header: Any) -> None:
        expected = {"format": JOURNAL_FORMAT, "search": self.description}
        if header == json.loads(json.dumps(expected)):
            return
        raise UserError(
            f"{path}: was written by another search, {json.dumps(header)} where this one is "
            f"{json.dumps(expected)}; give another folder"
        )

    def _open(self) -> None:
        """Cut a torn last line off and write the first one, where the file has none."""
        with open(self.path, "ab+") as handle:
            handle.seek(0)
            whole = handle.read().rfind(b"\n") + 1
            handle.truncate(whole)
        if not whole:
            self._append({"format": JOURNAL_FORMAT, "search": self.description})

    def write(self, key: str, measurement: Measurement) -> None:
        """Append one measurement; it is on disk when this returns."""
        self.known[key] = outcome = measurement.outcome
        error = outcome.error if math.isfinite(outcome.error) else None
        self._append({"candidate": key, **outcome._asdict(), "error": error})

    def _append(self, content: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(content) + "\n")
            handle.flush()
            os.fsync(handle.fileno())


class LayerCost(NamedTuple):
    """One layer's closed forms."""

    size: int
    operations: int


class Layers(NamedTuple):
    """The layers of C(B_n(...B_1(A(x)))): A, the least of the B_i, and C."""

    first: LayerCost
    middle: LayerCost
    last: LayerCost


class Condition(NamedTuple):
    """One condition of the AB^nC property, and where in the space it fails first."""

    text: str
    holds: bool
    counterexample: str = ""

    def __str__(self) -> str:
        """Return the line that is printed."""
        return f"{'holds' if self.holds else 'FAILS'}  {self.text}" + (
            f" ({self.counterexample})" if self.counterexample else ""
        )


def check_abnc(members: Sequence[Member], layers: Callable[[Any], Layers]) -> list[Condition]:
    """Say which conditions of the AB^nC property hold on a space of numeric architectures.

    The paper wants A and C to grow more slowly than any middle layer, in size and in operations.
    Two readings, both ours, are checked: *growth*, that from any member to one with no parameter
    smaller, A and C grow by a smaller factor than the middle layer, or not at all; and *amount*,
    that A and C are smaller than the middle layer everywhere. Closed forms say nothing of the other
    conditions: a smooth, for the FPTAS strongly convex problem, and SGD over a compact set of
    weights, which the theory mode provides.
    """
    costs = [layers(member.architecture) for member in members]
    conditions = []
    for measure, outer in itertools.product(LayerCost._fields, ("first", "last")):
        conditions.append(_growth_condition(members, costs, measure, outer))
        conditions.append(_amount_condition(members, costs, measure, outer))
    top = largest(members)
    beyond = [str(tuple(m.architecture)) for m in members if m.cost > top.cost]
    text = "one member is the largest in size and in operations"
    return [*conditions, Condition(text, not beyond, beyond[0] if beyond else "")]


def _column(costs: Sequence[Layers], layer: str, measure: str) -> np.ndarray:
    """Return one layer's measure for all members: float64 [members]."""
    return np.array([getattr(getattr(cost, layer), measure) for cost in costs], dtype=float)


def _growth_condition(
    members: Sequence[Member], costs: Sequence[Layers], measure: str, outer: str
) -> Condition:
    parameters = np.array([member.architecture for member in members])
    larger = (parameters[None] >= parameters[:, None]).all(axis=2)  # [from, to]
    amounts = (np.maximum(_column(costs, layer, measure), 1) for layer in (outer, "middle"))
    grown, middle = (amount[None] / amount[:, None] for amount in amounts)  # [from, to]
    faster = larger & (grown > 1) & (grown >= middle)
    text = f"{measure}: the {outer} layer grows by a smaller factor than a middle layer"
    if not faster.any():
        return Condition(text, True)
    start, end = np.argwhere(faster)[0]
    names = f"{tuple(members[start].architecture)} to {tuple(members[end].architecture)}"
    factors = f"{grown[start, end]:.3g} against {middle[start, end]:.3g} times"
    return Condition(text, False, f"{names}: {factors}, and {faster.sum() - 1} more pairs")


def _amount_condition(
    members: Sequence[Member], costs: Sequence[Layers], measure: str, outer: str
) -> Condition:
    amount, middle = (_column(costs, layer, measure) for layer in (outer, "middle"))
    text = f"{measure}: the {outer} layer is smaller than a middle layer"
    where = np.flatnonzero(amount >= middle)
    if not len(where):
        return Condition(text, True)
    first = where[0]
    example = f"{tuple(members[first].architecture)}: {amount[first]:.3g} against "
    return Condition(text, False, f"{example}{middle[first]:.3g}, and {len(where) - 1} more")


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Return which of the points [n, measures] no other beats: bool [n]. Less is better."""
    no_worse = (points[:, None] <= points[None]).all(axis=2)  # [by, beaten]
    better = (points[:, None] < points[None]).any(axis=2)
    return ~(no_worse & better).any(axis=0)
