"""The AB^nC property, under which the paper proves OSE's guarantee, on closed forms of layers."""

from __future__ import annotations

import itertools
from typing import Callable, NamedTuple, Sequence

import numpy as np

from bort.ose.candidates import Architecture
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
