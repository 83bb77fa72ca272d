"""Combinations of values: their order, and the limit on their number."""

from __future__ import annotations

import time

import pytest

from bort.errors import UserError
from bort.grids import MAX_COMBINATIONS, check_size, combinations


def test_the_last_name_changes_fastest():
    assert combinations({"a": [1, 2], "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_a_text_is_no_list_of_values():
    with pytest.raises(UserError, match="b: expected a list of values, found 'xy'"):
        combinations({"a": [1, 2], "b": "xy"})


def test_combinations_are_counted_before_they_are_built():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"grid.yaml: 146,830,437,604,321 combinations; at most 10"):
        check_size("grid.yaml", {str(name): range(59) for name in range(8)})
    check_size("grid.yaml", {"a": range(MAX_COMBINATIONS)})
    with pytest.raises(UserError, match="at most 3 are allowed"):
        check_size("grid.yaml", {"a": range(4)}, limit=3)
    assert time.monotonic() - start < 1
