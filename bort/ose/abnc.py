"""The AB^nC property, under which the paper proves OSE's guarantee, on closed forms of layers."""

from __future__ import annotations

import itertools
from typing import Callable, NamedTuple, Sequence

import numpy as np

from bort.ose.candidates import Architecture, name_of
from bort.ose.search import Member, largest


class LayerCost(NamedTuple):
    """One layer's closed forms."""

    size: int
    operations: int


class Layers(NamedTuple):
    """The layers of C(B_n(...B_1(A(x)))): A, the smallest of the B_i, and C."""

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


def check_abnc(
    members: Sequence[Member], layers: Callable[[Architecture], Layers]
) -> list[Condition]:
    """Check the conditions of the AB^nC property on a space of numeric architectures.

    The paper requires A and C to grow more slowly than any middle layer, in size and operations.
    Two readings, both ours, are checked. *Growth*: from any member to one with no parameter
    smaller, A and C grow by a smaller factor than the middle layer, or not at all. *Amount*: A and
    C are smaller than the middle layer everywhere. Closed forms cannot check the other conditions:
    a smooth problem (for the FPTAS a strongly convex one), and SGD over a compact set of weights,
    which the theory mode provides.
    """
    costs = [layers(member.architecture) for member in members]
    conditions = []
    for measure, outer in itertools.product(LayerCost._fields, ("first", "last")):
        conditions.append(_growth_condition(members, costs, measure, outer))
        conditions.append(_amount_condition(members, costs, measure, outer))
    top = largest(members)
    beyond = [name_of(m.architecture) for m in members if m.cost > top.cost]
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
    names = [name_of(members[index].architecture) for index in (start, end)]
    factors = f"{grown[start, end]:.3g} against {middle[start, end]:.3g} times"
    return Condition(text, False, f"{' to '.join(names)}: {factors}{_others(faster, 'pair')}")


def _amount_condition(
    members: Sequence[Member], costs: Sequence[Layers], measure: str, outer: str
) -> Condition:
    amount, middle = (_column(costs, layer, measure) for layer in (outer, "middle"))
    text = f"{measure}: the {outer} layer is smaller than a middle layer"
    larger = amount >= middle
    if not larger.any():
        return Condition(text, True)
    first = np.flatnonzero(larger)[0]
    example = f"{name_of(members[first].architecture)}: {amount[first]:.3g} against "
    return Condition(text, False, f"{example}{middle[first]:.3g}{_others(larger)}")


def _others(failing: np.ndarray, what: str = "") -> str:
    """Return how many fail besides the first, as the end of a line; nothing where none does."""
    others = int(failing.sum()) - 1
    plural = "s" if what and others > 1 else ""
    return f", and {others:,} more {what}{plural}".rstrip() if others else ""
