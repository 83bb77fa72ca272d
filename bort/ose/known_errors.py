"""Errors of architectures that were measured elsewhere, and synthetic ones."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

import numpy as np

from bort.errors import UserError, escaped, quoted
from bort.files import WHOLE_BYTES, open_regular
from bort.ose.bert_family import synthetic_error
from bort.ose.candidates import SurrogateError
from bort.shapes import Shape, shape_of
from bort.sums import check_sum
from bort.types import Hyperparameters


@dataclass(frozen=True)
class MeanError:
    """A surrogate error without training: the mean of errors that were measured elsewhere."""

    measured: Mapping[Shape, list[float]]

    def __call__(
        self, shape: Shape, steps: int, hparams: Hyperparameters, generator: np.random.Generator
    ) -> float:
        """Return the mean of the errors measured for this shape."""
        return float(np.mean(self.measured[shape]))


def read_errors(source: str, space: Sequence[Shape]) -> tuple[Sequence[Shape], SurrogateError]:
    """Return the architectures with known errors, and the function that gives these.

    `source` is a CSV file or the word `synthetic`, which knows an error of the whole space. Raises
    `UserError` naming file and line for what cannot be read or is outside the space.
    """
    if source == "synthetic":
        return space, synthetic_error
    measured: dict[Shape, list[float]] = {}
    check_sum(source)
    try:
        with open_regular(source, WHOLE_BYTES) as handle:
            reader = csv.DictReader(io.TextIOWrapper(handle, "utf-8-sig", newline=""))
            if not {"architecture", "error"} <= set(reader.fieldnames or ()):
                raise UserError(f"{source}:1: needs the columns architecture and error")
            for row in reader:
                shape, error = _read_row(f"{source}:{reader.line_num}", row)
                measured.setdefault(shape, []).append(error)
                if shape not in space:
                    raise UserError(
                        f"{source}:{reader.line_num}: {shape.name} is not in the space; give the "
                        "--space that contains it"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: cannot be read ({escaped(str(error))})") from None
    if not measured:
        raise UserError(f"{source}: contains no errors; give a row for each architecture")
    return list(measured), MeanError(measured)


def _read_row(where: str, row: Mapping[Optional[str], Any]) -> tuple[Shape, float]:
    if any(row.get(None, ())):  # the rest of a row; spreadsheets may write it empty
        raise UserError(f"{where}: has more fields than the header; numbers have decimal points")
    if None in row.values():
        raise UserError(f"{where}: has fewer fields than the header")
    try:
        shape = shape_of(row["architecture"])
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from None
    try:
        error = float(row["error"])
    except ValueError:
        raise UserError(f"{where}: error {quoted(row['error'])}: must be a number") from None
    if error < 0:
        raise UserError(f"{where}: error {error}: must not be negative")
    return shape, error
