"""Search spaces: YAML files that say which values hyperparameters take, and their combinations."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Collection, Sequence

from bort.config import check_limits
from bort.errors import UserError, quoted
from bort.files import read_yaml
from bort.grids import check_size, combinations
from bort.types import Hyperparameters

MAX_INTEGER = 2**63 - 1
EXACT_INTEGERS = 2**53  # from here on a float may stand for several integers
# Flags that have no effect beside another one: a grid of them would train the same again.
UNUSED = {"epochs": "training_steps", "prob": "model_parameters", "cpu_contexts": "gpus"}


def read_space(path: str, *defaults: Any) -> list[Hyperparameters]:
    """Read a YAML grid: each line the name of a hyperparameter and the list of its values.

    `defaults` are instances of settings dataclasses: their numeric fields are what a grid may
    vary, with the types and `option` limits of the fields (YAML reads 1e-4 as text). Returns every
    combination, the last name's values changing fastest. Raises `UserError`, also for a name that
    another one, or a value of `defaults`, leaves without effect.
    """
    types = {name: number for each in defaults for name, number in _numbers_of(type(each)).items()}
    content = _read_grid(path)
    unknown = [str(name) for name in content if name not in types]
    if unknown:
        raise UserError(f"{path}: {', '.join(unknown)}: unknown; known are {', '.join(types)}")
    _refuse_unused(path, content, defaults)
    check_size(path, content)
    values = {
        name: dict.fromkeys(_typed(path, name, value, types[name]) for value in listed)
        for name, listed in content.items()
    }
    space: list[Hyperparameters] = [*combinations(values)]
    for hparams in space:
        _check(path, defaults, hparams)
    return space


def _refuse_unused(path: str, content: Collection[str], defaults: Sequence[Any]) -> None:
    for name, other in UNUSED.items():
        given = other in content or any(getattr(each, other, None) for each in defaults)
        if name in content and given:
            raise UserError(f"{path}: {name}: has no effect with {other}; leave one of them out")


def _numbers_of(settings_class: type) -> dict[str, type]:
    """Return the numeric fields of a settings class, each int or float."""
    hints = typing.get_type_hints(settings_class).items()
    types = {name: {hint, *typing.get_args(hint)} for name, hint in hints}
    return {
        name: int if int in found else float
        for name, found in types.items()
        if found & {int, float}
    }


def _read_grid(path: str) -> dict[str, list[Any]]:
    content = read_yaml(path)
    lists = isinstance(content, dict) and all(isinstance(v, list) and v for v in content.values())
    if not lists or not content:
        raise UserError(f"{path}: must be lines of a name and a list, such as lr: [1e-4, 1e-5]")
    return content


def _typed(path: str, name: str, value: Any, expected: type) -> Any:
    """Return a value of a grid as int or float; integers are never rounded."""
    try:
        if expected is int and isinstance(value, (int, str)) and not isinstance(value, bool):
            if not -MAX_INTEGER <= int(value) <= MAX_INTEGER:
                raise UserError(f"{path}: {name}: {quoted(value)} has more than 63 bits")
            return int(value)
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    exact = math.isfinite(number) and number == expected(number)
    if expected is int and abs(number) >= EXACT_INTEGERS:
        exact = False
    if isinstance(value, bool) or not exact:
        kind = "an int" if expected is int else "a float"
        raise UserError(f"{path}: {name}: {quoted(value)} is not {kind}")
    return expected(number)


def _check(path: str, defaults: Sequence[Any], hparams: Hyperparameters) -> None:
    for settings in with_values(defaults, hparams):
        try:
            check_limits(settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def with_values(settings: Sequence[Any], hparams: Hyperparameters) -> list[Any]:
    """Return settings dataclasses with the values of `hparams` in place of their own."""
    chosen = []
    for each in settings:
        names = {field.name for field in dataclasses.fields(each)}.intersection(hparams)
        chosen.append(dataclasses.replace(each, **{name: hparams[name] for name in names}))
    return chosen
