"""Combinations of lists of values."""

from __future__ import annotations

import itertools
import math
from typing import Any, Iterable, Mapping, Sized

from bort.errors import UserError, quoted

MAX_COMBINATIONS = 10_000


def check_size(where: str, values: Mapping[str, Sized], limit: int = MAX_COMBINATIONS) -> None:
    """Raise `UserError` for more combinations than the limit; they are counted, not built."""
    count = math.prod(len(each) for each in values.values())
    if count > limit:
        raise UserError(f"{where}: {count:,} combinations; at most {limit:,} are allowed")


def combinations(values: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the values, the last name's changing fastest.

    Raises `UserError` for one text in place of a list: its letters would be the values.
    """
    for name, given in values.items():
        if isinstance(given, (str, bytes)):
            raise UserError(f"{name}: expected a list of values, found {quoted(given)}")
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]
