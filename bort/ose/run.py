"""OSE on the BERT family: what `scripts/run_ose.py` does.

<output_dir>/ose.json, ose.csv, ose.png    the table of the search
             strides.png                   with --compare_strides
             journal-0.jsonl               measured errors, from which a search is resumed
             teacher/, teacher_cache-*/    T's run and its stored outputs
"""

from __future__ import annotations

import os
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence

from bort import jobs
from bort.cluster import Cluster, refuse_with_cluster
from bort.communicator import Communicator, SingleProcess, communicator_of_environment
from bort.config import as_dict
from bort.errors import UserError
from bort.files import lock_folder
from bort.jobs import Caps, Executor, Processes, Ranks
from bort.mxnet_setup import usable_cores
from bort.ose.bert_family import BertFamily, heads_first, load_space, measure_latency
from bort.ose.candidates import (
    Candidate,
    Map,
    Measurement,
    SearchJournal,
    SurrogateError,
    check_journals,
    executor_map,
    has_journal,
)
from bort.ose.config import (
    SearchSettings,
    SpaceSettings,
    TrainingSettings,
    check_request,
    read_strides,
)
from bort.ose.error_bounds import frequency_loss
from bort.ose.known_errors import read_errors
from bort.ose.report import (
    OrderedSpace,
    compare_strides,
    explanation,
    member_of,
    print_space,
    write_report,
)
from bort.ose.search import (
    OseResult,
    check_maximum_point,
    check_stride,
    extract,
    largest,
    ordered,
)
from bort.ose.trained_error import (
    TrainedError,
    known_description,
    prepare_teacher,
    remove_candidates,
    search_description,
)
from bort.progress import ProgressBar
from bort.shapes import Shape, shape_of
from bort.types import JSONMapping
from data.shards import Manifest, open_shards

ROBERTA_VOCABULARY = 50265
STOPPED = "interrupted; rerun the same command to resume the search"


class Errors(NamedTuple):
    """The architectures to search, the function that gives their errors, and how it is called."""

    space: Sequence[Shape]
    surrogate: SurrogateError
    options: Mapping[str, Any] = {}  # more arguments of `extract`
    plateau: Optional[float] = None  # the error of a network that knows word frequencies alone


def run_ose(
    space_settings: SpaceSettings,
    settings: SearchSettings,
    training: TrainingSettings,
    cluster: Optional[str] = None,
) -> Optional[OseResult]:
    """Print and search as the settings say; returns the result of the search, if there was one.

    `cluster` is the address of one that trains the candidates. On ranks other than 0 it trains
    candidates for rank 0 and returns nothing.
    """
    check_request(space_settings, settings, training)
    communicator = communicator_of_environment() if training.data else SingleProcess()
    if communicator.size > 1 and (training.workers or cluster):
        flag = "--workers" if training.workers else "--cluster"
        raise UserError(f"{flag}: horovodrun spreads the search over its ranks; leave it out")
    refuse_with_cluster(cluster, "--workers", training.workers, None)
    manifests = open_manifests(training) if training.data else []
    space = load_ordered_space(space_settings, manifests)
    if settings.explain:  # now, not after the search
        explained = member_of(space.family, shape_of(settings.explain))
        check_maximum_point(space.maximum_point, [explained])
    if communicator.rank > 0:
        jobs.serve(communicator)
        return None
    everything = as_dict(space_settings, settings, training)
    if not training.data:
        return known_search(space, settings, everything)
    strides = read_strides(settings, len(space.members))
    for stride in strides:  # now, not after T's training
        check_stride(space.members, space.maximum_point, stride)
    with lock_folder(settings.output_dir, "--output_dir"), jobs.stopped_by_sigterm(STOPPED):
        with executor_of(training, communicator, cluster, settings.output_dir) as executor:
            errors = trained_errors(space, settings, training, manifests, executor)
            results = run_searches(space, errors, settings.seed, strides)
        remove_candidates(settings.output_dir)  # those of machines that were lost
        show(space, errors, settings, results, everything)
    return results[settings.stride]


def known_search(
    space: OrderedSpace, settings: SearchSettings, everything: JSONMapping
) -> Optional[OseResult]:
    """Search with errors that are known, if there are any, and print what is asked for."""
    if not settings.errors:
        show(space, None, settings, {}, everything)
        return None
    refuse_replacing(settings.errors, settings.output_dir)
    errors = Errors(*read_errors(settings.errors, space.shapes))
    strides = read_strides(settings, len(errors.space))
    results = run_searches(space, errors, settings.seed, strides)
    with lock_folder(settings.output_dir, "--output_dir"):
        show(space, errors, settings, results, everything)
    return results[settings.stride]


def refuse_replacing(errors: str, folder: str) -> None:
    """Raise `UserError` when the table would replace the known errors, or that of a training."""
    if os.path.realpath(errors) == os.path.realpath(os.path.join(folder, "ose.csv")):
        raise UserError(
            f"--errors {errors}: would be replaced by the table of this search; name another "
            "--output_dir"
        )
    if has_journal(folder):
        raise UserError(
            f"--output_dir {folder}: has a search that trained its architectures, whose table "
            "would be replaced; name another one"
        )


def open_manifests(settings: TrainingSettings) -> list[Manifest]:
    """Return the manifests of both sets of shards.

    Raises `UserError` when tokenizers differ, and for a set on which no error can be measured.
    """
    manifests = [open_shards(str(path)).manifest for path in (settings.data, settings.data_eval)]
    if manifests[0].tokenizer_fingerprint != manifests[1].tokenizer_fingerprint:
        raise UserError(
            f"--data_eval {settings.data_eval}: made with another tokenizer than --data "
            f"{settings.data}"
        )
    for flag, manifest in zip(("data", "data_eval"), manifests):
        if not manifest.totals["masked"]:
            raise UserError(
                f"--{flag} {getattr(settings, flag)}: none of its tokens is masked, as where the "
                "vocabulary does not know the text; make it again with one that does"
            )
    return manifests


def load_ordered_space(settings: SpaceSettings, manifests: Sequence[Manifest]) -> OrderedSpace:
    """Load and order the space; the vocabulary is that of the shards, if there are any.

    Raises `UserError` for an unknown space or T, for a T that a member exceeds, and for a
    --vocab_size other than the shards'.
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
    return OrderedSpace(family, members, top)


# ---- the search ----------------------------------------------------------------------------------


def executor_of(
    training: TrainingSettings,
    communicator: Communicator,
    cluster: Optional[str] = None,
    folder: str = "",
) -> Executor:
    """Return the executor that trains candidates: in processes, on Horovod's ranks, on a cluster.

    A cluster needs the folder of the search, on a shared disk.
    """
    caps = Caps(training.max_seconds, training.max_memory)
    if communicator.size > 1:
        return Ranks(communicator, isolated=(training.threads, caps))
    if cluster:
        return Cluster(cluster, folder, training.threads, caps)
    workers = training.workers or max(1, usable_cores() // training.threads)
    return Processes(workers, training.threads, caps)


def trained_errors(
    space: OrderedSpace,
    settings: SearchSettings,
    training: TrainingSettings,
    manifests: Sequence[Manifest],
    executor: Executor,
) -> Errors:
    """Return the errors that training gives; T is trained before, unless it has been.

    In nats per masked position of the held-out shards.
    """
    folder, teacher, entropy = settings.output_dir, None, 0.0
    check_journals(folder, known_description(training, manifests))  # now, not after T's training
    remove_candidates(folder)
    if training.loss == "mlm":
        sets = [open_shards(str(path)) for path in (training.data, training.data_eval)]
        plateau = frequency_loss(*sets)
    else:
        top = space.maximum_point.architecture
        teacher = prepare_teacher(training, top, settings.seed, folder)
        entropy, plateau = teacher.bounds
        print(f"T = {top.name}: entropy {entropy:.4f} nats, the lower bound of the cross-entropy")
    lower_bound = entropy if training.loss == "divergence" else 0.0
    options = {
        "max_steps": training.steps,
        "hparams": training.hyperparameters(),
        "repeats": training.repeats,
        "lower_bound": lower_bound,
        "map": with_progress(executor_map(executor), lower_bound),
        "journal": SearchJournal(folder, search_description(training, manifests, teacher)),
    }
    errors = TrainedError(training, folder, teacher)
    return Errors(space.shapes, errors, options, plateau - lower_bound)


def with_progress(spread: Map, lower_bound: float) -> Map:
    """Return a map that also prints each measurement, less the lower bound."""

    def printing(
        function: Callable[[Candidate], Measurement], candidates: Sequence[Candidate]
    ) -> Iterator[Measurement]:
        by_number = {candidate.number: candidate for candidate in candidates}
        for count, measurement in enumerate(spread(function, candidates), start=1):
            shape = by_number[measurement.number].architecture
            error = measurement.failure or f"error {measurement.error - lower_bound:.4f}"
            print(
                f"{count:>4} of {len(candidates)}  {shape.name}  {error}  "
                f"{measurement.seconds:.0f} s",
                flush=True,
            )
            yield measurement

    return printing


def run_searches(
    space: OrderedSpace, errors: Errors, seed: int, strides: Sequence[int]
) -> dict[int, OseResult]:
    """Extract the best of the architectures with errors, against the T of the whole space."""
    return {
        stride: extract(
            errors.space,
            space.family.parameter_size,
            space.family.inference_cost,
            errors.surrogate,
            maximum_point=space.maximum_point.architecture,
            stride=stride,
            seed=seed,
            tie_break=heads_first,
            **errors.options,
        )
        for stride in strides
    }


# ---- what is printed and written -----------------------------------------------------------------


def show(
    space: OrderedSpace,
    errors: Optional[Errors],
    settings: SearchSettings,
    results: Mapping[int, OseResult],
    everything: JSONMapping,
) -> None:
    """Print and write what the settings ask for; `everything` is recorded in ose.json.

    `errors` are those that were searched with, if any.
    """
    latencies: dict[Shape, float] = {}
    if settings.measure_latency:
        shapes = errors.space if errors else space.shapes
        latencies = measure_latencies(shapes, space.family.sequence_length)
    if settings.list or (settings.measure_latency and not results):
        print_space(space, latencies)
    if errors:
        best, folder = results[settings.stride], settings.output_dir
        bounds = errors.options.get("lower_bound", 0.0), errors.plateau
        write_report(best, space, latencies, everything, folder, *bounds)
        if settings.compare_strides:
            compare_strides(sorted(results.items()), settings.output_dir)
    if settings.explain:
        shape = shape_of(settings.explain)
        print("\n".join(explanation(space, shape, results.get(settings.stride))))


def measure_latencies(shapes: Sequence[Shape], sequence_length: int) -> dict[Shape, float]:
    """Return seconds for one input of each shape, with a progress bar on a terminal."""
    latencies = {}
    with ProgressBar("latency", len(shapes), unit="model", lines=False) as progress:
        for shape in shapes:
            latencies[shape] = measure_latency(shape, sequence_length)
            progress.advance()
    return latencies
