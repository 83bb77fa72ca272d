"""Search spaces: YAML files that say which values hyperparameters take, and their combinations."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from typing import Any, Sequence

from bort.config import check_limits
from bort.errors import UserError
from bort.files import read_yaml
from bort.types import Hyperparameters


def read_space(path: str, *defaults: Any) -> list[Hyperparameters]:
    """Read a YAML grid: the name of a hyperparameter and the list of its values, line by line.

    `defaults` are instances of settings dataclasses: their numbers are what a grid may vary, their
    `option` limits hold, and so do their types (YAML reads 1e-4 as text). Returns every
    combination, the last name's values changing fastest. Raises `UserError`.
    """
    kinds = {name: kind for one in defaults for name, kind in _numbers_of(type(one)).items()}
    content = _read_grid(path)
    unknown = [str(name) for name in content if name not in kinds]
    if unknown:
        raise UserError(f"{path}: {', '.join(unknown)}: unknown; there are {', '.join(kinds)}")
    values = {
        name: dict.fromkeys(_typed(path, name, one, kinds[name]) for one in given)
        for name, given in content.items()
    }
    sets = [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]
    for theta in sets:
        _check(path, defaults, theta)
    return list(sets)


def _numbers_of(settings_class: type) -> dict[str, type]:
    """Return the fields of a settings class that are numbers, and which kind of number."""
    hints = typing.get_type_hints(settings_class).items()
    found = {name: {hint, *typing.get_args(hint)} for name, hint in hints}
    return {name: int if int in kinds else float for name, kinds in found.items()
            if kinds & {int, float}}  # fmt: skip


def _read_grid(path: str) -> dict[str, list[Any]]:
    content = read_yaml(path)
    lists = isinstance(content, dict) and all(isinstance(v, list) and v for v in content.values())
    if not lists:
        raise UserError(f"{path}: must be lines of a name and a list, such as lr: [1e-4, 1e-5]")
    return content


def _typed(path: str, name: str, value: Any, kind: type) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number != kind(number):
        raise UserError(f"{path}: {name}: {value!r} is no {kind.__name__}")
    return kind(number)


def _check(path: str, defaults: Sequence[Any], theta: Hyperparameters) -> None:
    for one in with_values(defaults, theta):
        try:
            check_limits(one)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def with_values(settings: Sequence[Any], theta: Hyperparameters) -> list[Any]:
    """Return settings dataclasses with the values of a set in place of their own."""
    chosen = []
    for one in settings:
        names = {field.name for field in dataclasses.fields(one)}.intersection(theta)
        chosen.append(dataclasses.replace(one, **{name: theta[name] for name in names}))
    return chosen
