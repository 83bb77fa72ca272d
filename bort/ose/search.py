"""OSE: the approximation scheme for optimal subarchitecture extraction, for any family of networks.

An Approximation Algorithm for Optimal Subarchitecture Extraction (arXiv 2010.08512). From a space
of architectures it extracts the one with the largest W-coefficient: small, fast and accurate in
comparison with the maximum point T, the largest member. Size and speed are closed forms of the
architectural parameters; only the error needs training, and only a bounded number of steps.

From the paper, as its abstract and accounts of it by others have it: the three measures, T, the
W-coefficient, one visit every `stride` positions of the ordered space, the best over all sets of
hyperparameters. Where they are silent the choices are ours:

- The order: size, inference cost, `tie_break`, all ascending. Positions 0, stride, 2 * stride, ...
  are visited.
- T, and any other member with W = 0 whatever its error, is listed but not trained.
- An error below `MINIMUM_ERROR` counts as that much; one that is not finite (a diverged run, an
  exceeded cap on time or memory) gives W = 0, and the table says why.
- Repeated seeds are averaged before W is computed. Ties go to the smaller, then the earlier model.
- A candidate's random generator is keyed by seed, architecture, hyperparameters and repeat, so that
  its error depends neither on the stride nor on where it is trained.
- The quality: the paper's rho <= |1 - stride| is read as W_best / W_found - 1 <= stride - 1, hence
  W_found >= W_best / stride. It presumes an error that is smooth along the order.
"""

from __future__ import annotations

import builtins
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from bort.errors import UserError
from bort.grids import combinations
from bort.ose.candidates import (
    Architecture,
    Candidate,
    Evaluator,
    Map,
    Measurement,
    SearchJournal,
    SurrogateError,
    name_of,
)
from bort.types import Hyperparameters

Measure = Callable[[Architecture], int]

MINIMUM_ERROR = 1e-7
# What a set of hyperparameters holds besides the values of the grid, for `surrogate_error` to use.
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


@dataclass(frozen=True)
class Evaluation:
    """One row of the table: an architecture with one set of hyperparameters."""

    position: int  # in the ordered space
    architecture: Architecture
    hparams: Hyperparameters
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
    """The best evaluation, all of them in order, and the maximum point they are measured by."""

    best: Evaluation
    table: tuple[Evaluation, ...]
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
    tie_break: Callable[[Architecture], Any] = tuple,
) -> list[Member]:
    """Return the distinct members of the space in the order of the search.

    Raises `UserError` for an empty space.
    """
    members = [Member(a, parameter_size(a), inference_cost(a)) for a in set(space)]
    if not members:
        raise UserError("the search space is empty: give at least one architecture")
    return sorted(members, key=lambda m: (m.size, m.cost, tie_break(m.architecture)))


def largest(members: Sequence[Member]) -> Member:
    """Return the maximum point T of ordered members: most parameters, then highest cost."""
    return max(reversed(members), key=lambda m: (m.size, m.cost))


def hyperparameter_sets(mode: str = "practical", **grid: Sequence[Any]) -> list[Hyperparameters]:
    """Return the mode's settings with every combination of the values of the grid.

    Raises `UserError` for a mode that is not in `MODES`, and for one text in place of a list.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: must be one of {', '.join(MODES)}")
    return [{**MODES[mode], **chosen} for chosen in combinations(grid)]


def extract(
    space: Iterable[Architecture],
    parameter_size: Measure,
    inference_cost: Measure,
    surrogate_error: SurrogateError,
    maximum_point: Architecture | None = None,
    stride: int = 1,
    max_steps: int = 200,
    *,
    hparams: Sequence[Hyperparameters] = ({},),
    repeats: int = 1,
    seed: int = 0,
    lower_bound: float = 0.0,
    tie_break: Callable[[Architecture], Any] = tuple,
    map: Map = builtins.map,
    journal: SearchJournal | None = None,
) -> OseResult:
    """Visit every `stride`-th member of the ordered space; return the one of the largest W.

    Args:
        space: architectures, tuples of plain values.
        parameter_size: closed form p, the number of parameters.
        inference_cost: closed form i, the operations that answer one input.
        surrogate_error: (architecture, steps, hyperparameters, generator) -> error of a network
            trained for that many steps. It has to be picklable for `process_map`; for a candidate
            that cannot be measured it may return infinity or raise `CapError`.
        maximum_point: T; default the largest member of the space.
        stride: the interval; 1 visits everything.
        max_steps: training steps, passed on to `surrogate_error`.
        hparams: sets of hyperparameters, each of plain JSON values.
        repeats: training runs to average, each with its own generator.
        seed: of the candidates' random generators.
        lower_bound: of the errors of `surrogate_error`; it is subtracted from them.
        tie_break: orders members of equal size and cost.
        map: calls a function on every candidate and yields the measurements, in any order.
        journal: records measurements as they are made; those that it holds are not repeated.

    Raises:
        UserError: an empty space; a stride, a number of repeats or of sets of hyperparameters out
            of range; a T that is not the largest; no W above 0, if possible before any training.
        ValueError: an error below `lower_bound`, as soon as it is measured.
    """
    hparams = list(hparams)  # walked through twice
    if repeats < 1 or not hparams:
        raise UserError("the search needs at least one repeat and one set of hyperparameters")
    members = ordered(space, parameter_size, inference_cost, tie_break)
    if not 1 <= stride <= len(members):
        raise UserError(f"stride {stride}: must be from 1 to {len(members)}, the space's size")
    top = _maximum_member(members, maximum_point, parameter_size, inference_cost)

    check_stride(members, top, stride)
    visited = members[::stride]
    trained = [m.architecture for m in visited if size_and_speed_gain(m, top) > 0]
    runs = itertools.product(trained, hparams, range(repeats))
    candidates = [Candidate(number, *run) for number, run in enumerate(runs)]
    evaluator = Evaluator(surrogate_error, max_steps, seed)
    found = _measure(map, evaluator, candidates, journal, lower_bound)

    table = []
    for (index, member), chosen in itertools.product(enumerate(visited), hparams):
        measured = [next(found) for _ in range(repeats)] if member.architecture in trained else []
        table.append(_evaluation(index * stride, member, chosen, top, measured, lower_bound))
    return OseResult(_best(table, stride), tuple(table), top, len(members))


def _maximum_member(
    members: Sequence[Member],
    given: Architecture | None,
    parameter_size: Measure,
    inference_cost: Measure,
) -> Member:
    """Return T, the largest member unless one is given; `UserError` when a member exceeds it."""
    top = largest(members)
    if given is not None:
        top = Member(given, parameter_size(given), inference_cost(given))
    check_maximum_point(top, members)
    return top


def _best(table: Sequence[Evaluation], stride: int) -> Evaluation:
    """Return the row of the largest W; `UserError` when none is above 0."""
    best = max(table, key=lambda row: row.w)
    if best.w == 0:
        raise UserError(
            f"stride {stride}: no visited architecture has a W above 0: no error is finite; "
            "find out why they failed"
        )
    return best


def check_maximum_point(top: Member, members: Sequence[Member]) -> None:
    """Raise `UserError` when a member exceeds T: W would reward it, as it takes absolute values.

    And for a T without parameters or operations, by which W divides.
    """
    if not (top.size and top.cost):
        raise UserError(
            f"maximum point {name_of(top.architecture)}: has "
            f"{top.size} parameters and {top.cost} operations; both must be above 0"
        )
    beyond = [m for m in members if m.size > top.size or m.cost > top.cost]
    if beyond:
        names = [name_of(m.architecture) for m in (top, beyond[-1])]
        raise UserError(
            f"maximum point {names[0]}: {names[1]} has more parameters or operations; give a "
            "maximum point that it does not exceed"
        )


def check_stride(members: Sequence[Member], top: Member, stride: int) -> None:
    """Raise `UserError` when W is 0 for all that a stride visits, whatever their errors."""
    if not any(size_and_speed_gain(member, top) for member in members[::stride]):
        raise UserError(
            f"stride {stride}: all architectures that it visits have the parameters or the "
            "operations of the maximum point, and W = 0 whatever their errors; give another "
            "stride, space or maximum point"
        )


def _measure(
    spread: Map,
    evaluator: Evaluator,
    candidates: Sequence[Candidate],
    journal: SearchJournal | None,
    lower_bound: float,
) -> Iterator[Measurement]:
    """Return the measurements in the order of the candidates; record those made now."""
    found: dict[int, Measurement] = {}
    known = journal.known if journal else {}
    for candidate in candidates:
        if measurement := known.get(evaluator.key(candidate)):
            found[candidate.number] = measurement
    missing = [candidate for candidate in candidates if candidate.number not in found]
    for measurement in spread(evaluator, missing) if missing else ():
        if measurement.error < lower_bound:  # what follows would be measured in vain
            architecture = candidates[measurement.number].architecture
            raise ValueError(
                f"error {measurement.error} of {architecture}: must not be negative or below "
                f"lower_bound, {lower_bound}"
            )
        found[measurement.number] = measurement
        if journal:
            journal.write(evaluator.key(candidates[measurement.number]), measurement)
    if len(found) < len(candidates):
        raise RuntimeError(f"map returned {len(found)} of {len(candidates)} measurements")
    return iter([found[candidate.number] for candidate in candidates])


def _evaluation(
    position: int,
    member: Member,
    hparams: Hyperparameters,
    top: Member,
    measured: Sequence[Measurement],
    lower_bound: float,
) -> Evaluation:
    errors = tuple(m.error - lower_bound for m in measured)
    error = float(np.mean(errors)) if errors else None
    failures = [m.failure for m in measured if m.failure]
    return Evaluation(
        position=position,
        architecture=member.architecture,
        hparams=hparams,
        size=member.size,
        cost=member.cost,
        gain=size_and_speed_gain(member, top),
        errors=errors,
        error=error,
        failure=failures[0] if failures else "",
        w=0.0 if error is None else w_coefficient(member, top, error),
        seconds=sum(m.seconds for m in measured),
    )


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Return which of the points [n, measures] no other dominates: bool [n]. Less is better."""
    no_worse = (points[:, None] <= points[None]).all(axis=2)  # [by, dominated]
    better = (points[:, None] < points[None]).any(axis=2)
    return ~(no_worse & better).any(axis=0)
