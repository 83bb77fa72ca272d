"""Search the BERT family for the shape with the largest W-coefficient (see bort/ose.py).

Without training: `--list` shows a space with its closed forms, `--explain` what one shape would
need to win, and `--errors` searches with errors that were measured elsewhere.
"""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.bort import MAX_LENGTH, Shape, shape_of
from bort.config import as_dict, option, parse
from bort.errors import UserError, door
from bort.ose import (
    OseResult,
    SurrogateError,
    Theta,
    check_maximum_point,
    extract,
    largest,
    ordered,
)
from bort.ose_bert import (
    SPACES,
    BertFamily,
    heads_first,
    load_space,
    measure_latency,
    synthetic_error,
)
from bort.ose_report import (
    Frame,
    compare_strides,
    explanation,
    member_of,
    print_space,
    write_report,
)


@dataclass(frozen=True)
class SpaceSettings:
    """The architectures and how their size and cost are counted."""

    space: str = option("bert", f"{', '.join(SPACES)}, or a .yaml file")
    maximum_point: Optional[str] = option(
        None, "model name of T; else the largest member of the space"
    )
    vocab_size: int = option(50265, "entries of the vocabulary", minimum=1)
    max_length: int = option(MAX_LENGTH, "positions of the embedding", minimum=1)
    sequence_length: int = option(512, "tokens of the input whose cost is counted", minimum=1)
    effective: bool = option(False, "count the encoder's parameters alone, without embeddings")
    all_operations: bool = option(
        False, "count every operation, where the default counts multiply-accumulates"
    )


@dataclass(frozen=True)
class SearchSettings:
    """What is done with the space."""

    list: bool = option(False, "print the ordered space and the AB^nC conditions that hold on it")
    explain: Optional[str] = option(None, "model name: print what it costs and when it would win")
    errors: Optional[str] = option(
        None,
        "search with these errors: a CSV file with the columns architecture and error, repeated "
        "lines averaged, or the word synthetic for a made-up scaling law",
    )
    stride: int = option(1, "visit every so many architectures of the ordered space", minimum=1)
    compare_strides: Optional[str] = option(
        None, "strides with commas between: search with each, print and plot what each finds"
    )
    measure_latency: bool = option(False, "measure the CPU's time for one input beside the cost")
    seed: int = option(0, "of the noise in synthetic errors", minimum=0)
    output_dir: str = option("runs/ose", "folder of ose.json, ose.csv and the plots")

    def check(self) -> None:
        """Raise `UserError` when there is nothing to do or nothing to do it with."""
        if not (self.list or self.explain or self.errors or self.measure_latency):
            raise UserError("nothing to do: give --list, --explain, --errors or --measure_latency")
        if self.compare_strides and not self.errors:
            raise UserError("--compare_strides needs --errors: the errors to search with")


class Errors(NamedTuple):
    """The architectures to search, and the function that gives their errors."""

    space: list[Shape]
    surrogate: SurrogateError


@door
def main(argv: Optional[Sequence[str]] = None) -> Optional[OseResult]:
    """Do what the flags say; return the search's result when there was a search."""
    description = (__doc__ or "").strip()
    space_settings, settings = parse(description, argv, SpaceSettings, SearchSettings)
    frame = frame_of(space_settings)
    searched = [member.architecture for member in frame.members]
    errors = read_errors(settings.errors, searched) if settings.errors else None
    latencies: dict[Shape, float] = {}
    if settings.measure_latency:
        shapes = errors.space if errors else searched
        latencies = measure_latencies(shapes, space_settings.sequence_length)
    if settings.list or (settings.measure_latency and not errors):
        print_space(frame, latencies)
    result = None
    if errors:
        search = partial(run_search, frame, errors, settings.seed)
        strides = read_strides(settings.compare_strides, len(errors.space))
        result = search(settings.stride)
        folder = settings.output_dir
        os.makedirs(folder, exist_ok=True)
        write_report(result, frame, latencies, as_dict(space_settings, settings), folder)
        if strides:
            compare_strides([(stride, search(stride)) for stride in strides], folder)
    if settings.explain:
        print("\n".join(explanation(frame, shape_of(settings.explain), result)))
    return result


def frame_of(settings: SpaceSettings) -> Frame:
    """Load and order the space.

    Raises `UserError` for an unknown space or T, and for a T that a member exceeds.
    """
    family = BertFamily(
        settings.vocab_size,
        settings.max_length,
        settings.sequence_length,
        settings.effective,
        settings.all_operations,
    )
    space = load_space(settings.space)
    members = ordered(space, family.parameter_size, family.inference_cost, heads_first)
    top = largest(members)
    if settings.maximum_point is not None:
        top = member_of(family, shape_of(settings.maximum_point))
    check_maximum_point(top, members)
    return Frame(family, members, top)


class MeanError(NamedTuple):
    """A surrogate error that trains nothing: looks up the mean of what was measured elsewhere."""

    measured: Mapping[Shape, list[float]]

    def __call__(
        self, shape: Shape, steps: int, theta: Theta, generator: np.random.Generator
    ) -> float:
        """Return the mean of the errors measured for this shape."""
        return float(np.mean(self.measured[shape]))


def read_errors(source: str, space: Sequence[Shape]) -> Errors:
    """Return the errors of a CSV file with its architectures, or synthetic ones for the space.

    Raises `UserError` naming file and line for what cannot be read or lies outside the space.
    """
    if source == "synthetic":
        return Errors(list(space), synthetic_error)
    measured: dict[Shape, list[float]] = {}
    try:
        with open(source, encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            if not {"architecture", "error"} <= set(reader.fieldnames or ()):
                raise UserError(f"{source}:1: needs the columns architecture and error")
            for row in reader:
                shape, error = _read_row(f"{source}:{reader.line_num}", row)
                measured.setdefault(shape, []).append(error)
                if shape not in space:
                    raise UserError(
                        f"{source}:{reader.line_num}: {shape.name} is not in the space; give the "
                        "--space that holds it"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    if not measured:
        raise UserError(f"{source}: holds no errors; give a line for each architecture")
    return Errors(list(measured), MeanError(measured))


def _read_row(where: str, row: Mapping[str, Optional[str]]) -> tuple[Shape, float]:
    try:
        shape, error = shape_of(row["architecture"] or ""), float(row["error"] or "")
    except (UserError, ValueError) as problem:
        raise UserError(f"{where}: {problem}") from None
    if error < 0:
        raise UserError(f"{where}: error {error}: must not be negative")
    return shape, error


def read_strides(text: Optional[str], most: int) -> list[int]:
    """Return the strides of a list with commas, ascending, with 1 among them; none for None."""
    if text is None:
        return []
    try:
        strides = {int(one) for one in text.split(",")}
    except ValueError:
        raise UserError(f"--compare_strides {text}: must be whole numbers, as in 1,2,4") from None
    if min(strides) < 1 or max(strides) > most:
        raise UserError(f"--compare_strides {text}: each must be from 1 to {most}")
    return sorted(strides | {1})


def measure_latencies(shapes: Sequence[Shape], sequence_length: int) -> dict[Shape, float]:
    """Return seconds for one input of each shape, with a progress bar on a terminal."""
    from tqdm import tqdm

    bar = tqdm(shapes, unit="model", disable=not sys.stderr.isatty())
    return {shape: measure_latency(shape, sequence_length) for shape in bar}


def run_search(frame: Frame, errors: Errors, seed: int, stride: int) -> OseResult:
    """Extract the best of the architectures with errors, against the whole space's T."""
    return extract(
        errors.space,
        frame.family.parameter_size,
        frame.family.inference_cost,
        errors.surrogate,
        maximum_point=frame.top.architecture,
        stride=stride,
        seed=seed,
        tie_break=heads_first,
    )


if __name__ == "__main__":
    main()
