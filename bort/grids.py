"""Combinations of lists of values."""

from __future__ import annotations

import itertools
import math
from typing import Any, Iterable, Mapping, Sized

from bort.errors import UserError

MAX_COMBINATIONS = 10_000


def check_size(where: str, values: Mapping[str, Sized], limit: int = MAX_COMBINATIONS) -> None:
    """Raise `UserError` for more combinations than the limit; they are counted, not built."""
    count = math.prod(len(each) for each in values.values())
    if count > limit:
        raise UserError(f"{where}: {count:,} combinations; at most {limit:,} are allowed")


def combinations(values: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the values, the last name's changing fastest."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]
