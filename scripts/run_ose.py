"""Search the BERT family for the shape with the largest W-coefficient (see bort/ose/search.py).

With training: `--data` and `--data_eval` name shards; every candidate is trained on the first and
its error is measured on the second. A search that was killed goes on where it was. Under
`horovodrun` the ranks share the candidates.

Without training: `--list` shows a space with its closed forms, `--explain` what one shape would
need to win, and `--errors` searches with errors that were measured elsewhere.
"""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.communicator import Communicator, SingleProcess, communicator_of_environment
from bort.config import as_dict, option, parse
from bort.errors import UserError, entry_point
from bort.mxnet_setup import usable_cores
from bort.ose.bert_family import (
    SPACES,
    BertFamily,
    heads_first,
    load_space,
    measure_latency,
    synthetic_error,
)
from bort.ose.report import (
    Frame,
    compare_strides,
    explanation,
    member_of,
    print_space,
    write_report,
)
from bort.ose.search import (
    Candidate,
    Journal,
    Map,
    Measurement,
    OseResult,
    SurrogateError,
    check_maximum_point,
    extract,
    largest,
    ordered,
    process_map,
    rank_map,
)
from bort.ose.trained_error import (
    TrainedError,
    TrainingSettings,
    describe,
    prepare_teacher,
    remove_candidates,
)
from bort.shapes import MAX_LENGTH, Shape, shape_of
from bort.types import Hyperparameters
from data.shards import Manifest, open_shards

ROBERTA_VOCABULARY = 50265


@dataclass(frozen=True)
class SpaceSettings:
    """The architectures and how their size and cost are counted."""

    space: str = option("bert", f"{', '.join(SPACES)}, or a .yaml file")
    maximum_point: Optional[str] = option(
        None, "model name of T; else the largest member of the space"
    )
    vocab_size: Optional[int] = option(
        None, "entries of the vocabulary (without: those of --data, or RoBERTa's 50265)", minimum=1
    )
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
    seed: int = option(0, "of everything that is drawn", minimum=0)
    output_dir: str = option(
        "runs/ose", "folder of ose.json, ose.csv, the plots, the journal and T's training"
    )


class Errors(NamedTuple):
    """The architectures to search, the function that gives their errors, and how it is called."""

    space: list[Shape]
    surrogate: SurrogateError
    options: Mapping[str, Any] = {}  # more arguments of `extract`


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[OseResult]:
    """Do what the flags say; return the search's result when there was a search."""
    description = (__doc__ or "").strip()
    classes = (SpaceSettings, SearchSettings, TrainingSettings)
    space_settings, settings, training = parse(description, argv, *classes)
    check_request(space_settings, settings, training)
    communicator = communicator_of_environment() if training.data else SingleProcess()
    manifests = open_data(training) if training.data else []
    frame = frame_of(space_settings, manifests)
    space = [member.architecture for member in frame.members]
    errors = read_errors(settings.errors, space) if settings.errors else None
    strides = read_strides(settings, len(errors.space if errors else space))
    if training.data:
        errors = trained_errors(frame, settings, training, manifests, communicator)
    results = {}
    if errors:
        results = {stride: run_search(frame, errors, settings.seed, stride) for stride in strides}
    if communicator.rank == 0:
        shapes = errors.space if errors else space
        show(frame, shapes, settings, results, as_dict(space_settings, settings, training))
    return results.get(settings.stride)


def check_request(
    space: SpaceSettings, settings: SearchSettings, training: TrainingSettings
) -> None:
    """Raise `UserError` when there is nothing to do, nothing to do it with, or too much."""
    asked = (settings.list, settings.explain, settings.errors, settings.measure_latency)
    if not (any(asked) or training.data):
        raise UserError(
            "nothing to do: give --list, --explain, --errors, --data or --measure_latency"
        )
    if settings.errors and training.data:
        raise UserError("--errors stands for training: leave --data out, or --errors")
    if settings.compare_strides and not (settings.errors or training.data):
        raise UserError("--compare_strides needs --errors or --data: the errors to search with")
    if training.data and space.max_length != MAX_LENGTH:
        raise UserError(
            f"--max_length {space.max_length}: networks are trained with {MAX_LENGTH} positions"
        )


def open_data(settings: TrainingSettings) -> list[Manifest]:
    """Return the manifests of both sets of shards; raises `UserError` when tokenizers differ."""
    manifests = [open_shards(str(path)).manifest for path in (settings.data, settings.data_eval)]
    if manifests[0].tokenizer_fingerprint != manifests[1].tokenizer_fingerprint:
        raise UserError(
            f"--data_eval {settings.data_eval}: made with another tokenizer than --data "
            f"{settings.data}"
        )
    return manifests


def show(
    frame: Frame,
    shapes: Sequence[Shape],
    settings: SearchSettings,
    results: Mapping[int, OseResult],
    everything: Mapping[str, Any],
) -> None:
    """Print and write what the flags ask for."""
    latencies: dict[Shape, float] = {}
    if settings.measure_latency:
        latencies = measure_latencies(shapes, frame.family.sequence_length)
    if settings.list or (settings.measure_latency and not results):
        print_space(frame, latencies)
    if results:
        os.makedirs(settings.output_dir, exist_ok=True)
        result = results[settings.stride]
        write_report(result, frame, latencies, everything, settings.output_dir)
        if settings.compare_strides:
            compare_strides(sorted(results.items()), settings.output_dir)
    if settings.explain:
        shape = shape_of(settings.explain)
        print("\n".join(explanation(frame, shape, results.get(settings.stride))))


def frame_of(settings: SpaceSettings, manifests: Sequence[Manifest]) -> Frame:
    """Load and order the space; the vocabulary is that of the shards, if there are any.

    Raises `UserError` for an unknown space or T, for a T that a member exceeds, and for a
    --vocab_size that is not the shards'.
    """
    vocab_size = manifests[0].vocab_size if manifests else ROBERTA_VOCABULARY
    if manifests and settings.vocab_size not in (None, vocab_size):
        raise UserError(f"--vocab_size {settings.vocab_size}: the shards have {vocab_size} tokens")
    family = BertFamily(
        settings.vocab_size or vocab_size,
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
        self, shape: Shape, steps: int, theta: Hyperparameters, generator: np.random.Generator
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


def read_strides(settings: SearchSettings, most: int) -> list[int]:
    """Return all strides to search with: --stride, those of --compare_strides, and 1 with these."""
    strides = {settings.stride}
    if settings.compare_strides:
        try:
            strides |= {1, *map(int, settings.compare_strides.split(","))}
        except ValueError:
            raise UserError(
                f"--compare_strides {settings.compare_strides}: must be whole numbers, as in 1,2,4"
            ) from None
    wrong = [stride for stride in strides if not 1 <= stride <= most]
    if wrong:
        raise UserError(f"stride {wrong[0]}: must be from 1 to {most}, the space's size")
    return sorted(strides)


def measure_latencies(shapes: Sequence[Shape], sequence_length: int) -> dict[Shape, float]:
    """Return seconds for one input of each shape, with a progress bar on a terminal."""
    from tqdm import tqdm

    bar = tqdm(shapes, unit="model", disable=not sys.stderr.isatty())
    return {shape: measure_latency(shape, sequence_length) for shape in bar}


def trained_errors(
    frame: Frame,
    settings: SearchSettings,
    training: TrainingSettings,
    manifests: Sequence[Manifest],
    communicator: Communicator,
) -> Errors:
    """Return the errors that training gives, once T is there; T is trained by rank 0."""
    folder, teacher = settings.output_dir, None
    spread = map_of(training, communicator)
    if communicator.rank == 0:
        os.makedirs(folder, exist_ok=True)
        remove_candidates(folder)  # of a search that was killed
        if training.loss == "teacher":
            top = frame.top.architecture
            teacher = prepare_teacher(training, top, settings.seed, folder)
            print(f"T = {top.name}: entropy {teacher.entropy:.4f} nats, the least error there is")
    teacher = communicator.broadcast_object(teacher)
    options = {
        "max_steps": training.steps,
        "thetas": training.thetas(),
        "repeats": training.repeats,
        "map": spread,
        "journal": Journal(folder, describe(training, manifests, teacher), communicator.rank),
    }
    space = [member.architecture for member in frame.members]
    return Errors(space, TrainedError(training, folder, teacher), options)


def map_of(training: TrainingSettings, communicator: Communicator) -> Map:
    """Return how the candidates are spread: over Horovod's ranks, or over processes."""
    if communicator.size > 1:
        if training.workers:
            raise UserError("--workers: horovodrun has spread the search; leave the flag out")
        spread = rank_map(communicator.rank, communicator.size, communicator.allreduce)
        return told(spread) if communicator.rank == 0 else spread
    workers = training.workers or max(1, usable_cores() // training.threads)
    return told(process_map(workers) if workers > 1 else map)


def told(spread: Map) -> Map:
    """Return a map that also prints what is measured, as it comes."""

    def telling(
        function: Callable[[Candidate], Measurement], candidates: Sequence[Candidate]
    ) -> Iterator[Measurement]:
        for count, measurement in enumerate(spread(function, candidates), start=1):
            if measurement.fresh:
                outcome, one = measurement.outcome, candidates[measurement.number]
                error = outcome.failure or f"error {outcome.error:.4f}"
                print(
                    f"{count:>4} of {len(candidates)}  {one.architecture.name}  {error}  "
                    f"{outcome.seconds:.0f} s",
                    flush=True,
                )
            yield measurement

    return telling


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
        **errors.options,
    )


if __name__ == "__main__":
    main()
