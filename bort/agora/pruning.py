"""Which sets of hyperparameters a round drops, and how augmented examples are balanced."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import numpy as np

from bort.types import Hyperparameters


def longest_common_subsequence(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Return the longest sequence that both contain in order, gaps allowed, in O(n m)."""
    longest: list[list[Any]] = [[] for _ in range(len(second) + 1)]
    for item in first:
        previous = longest
        longest = [[]]
        for index, other in enumerate(second):
            if item == other:
                longest.append([*previous[index], item])
            else:
                longest.append(max(longest[index], previous[index + 1], key=len))
    return longest[-1]


def _contains(sequence: Sequence[Any], part: Sequence[Any]) -> bool:
    rest = iter(sequence)
    return all(item in rest for item in part)


def _common_with_worst(sequences: Sequence[Sequence[Any]]) -> set[int]:
    common = max(
        (longest_common_subsequence(sequences[0], other) for other in sequences[1:]),
        key=len,
        default=[],
    )
    if not common:
        return {0}
    return {index for index, each in enumerate(sequences) if _contains(each, common)}


_STRATEGIES: dict[str, Callable[[Sequence[Sequence[Any]]], set[int]]] = {
    "lcs": _common_with_worst,
    "worst-only": lambda sequences: {0},
    "halving": lambda sequences: set(range(len(sequences) // 2)),
}


def sets_to_drop(
    order: Sequence[int],
    search_space: Sequence[Hyperparameters],
    strategy: str,
    constants_count: bool = False,
) -> list[int]:
    """Return the sets that a round drops, worst first, as indices in the search space.

    `order` lists the current sets from worst to best. At least one set is dropped, and the best
    only when it is the only one. What all sets of the search space share does not count as common:
    a search over `lr` with one value of `epochs` would otherwise lose all but the best at once.

    constants_count: it does, as in runs that an earlier version began.
    """
    constants = search_space[0].items() if not constants_count else ()
    shared = [one for one in constants if all(one in s.items() for s in search_space)]
    sequences = [
        [one for one in search_space[index].items() if one[0] != "seed" and one not in shared]
        for index in order
    ]
    dropped = _STRATEGIES[strategy](sequences) | {0}
    if len(order) > 1:
        dropped -= {len(order) - 1}
    return [order[rank] for rank in sorted(dropped)]


def within_balance(
    present: np.ndarray,
    new: np.ndarray,
    classes: Sequence[Any],
    tolerance: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Choose new rows so that no class that gains rows has a share above 1 / classes + tolerance.

    `present` [n] and `new` [m] are the classes of present and of new rows. Returns a mask [m] with
    as many True as the limit allows; which rows of a class are dropped is random.
    """
    limit = 1 / len(classes) + tolerance + 1e-9
    have = np.array([np.sum(present == label) for label in classes])
    quota = np.array([np.sum(new == label) for label in classes])
    over = np.ones(len(classes), bool)
    while over.any():  # fewer rows of one class lower the limits of all
        over = (quota > 0) & (have + quota > limit * (have.sum() + quota.sum()))
        quota = quota - over
    keep = np.zeros(len(new), bool)
    for label, count in zip(classes, quota):
        keep[generator.permutation(np.flatnonzero(new == label))[:count]] = True
    return keep
