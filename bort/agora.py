"""Agora: fine-tuning when training data is scarce or biased (A. de Wynter, arXiv 2010.07990).

A candidate model (*Socrates*) is fitted once for every set of hyperparameters in a search space.
Examples of the dev set that the best fit gets wrong are moved a little by a *tau-function*,
labelled by a model that is only roughly right (*Timaeus*) and appended to the training set; the
least promising sets are dropped; and so on until none is left. The loop knows nothing about
models, text or frameworks: it needs the three small protocols below, NumPy and nothing else.

Stated by the paper (abstract, first page) or by its author's public notes:

- the inputs: candidate, trained labeller, train set, evaluation set, search space, tau-function;
- every round fits all sets on the current data, scores them on the evaluation set and keeps the
  best model ever seen (the choice is greedy);
- new examples come from the evaluation set's mistakes; the evaluation set itself never enters
  the training set; the labeller labels the new examples;
- the sets are ordered by score and those in the longest common sequence rooted at the first
  element are removed; the loop ends when the space is empty;
- tau(x) lies near x, with a lower and an upper bound on the distance;
- the labeller has to be better than 2/3; labels should be balanced, by artificial means if need
  be; the evaluation set has to be representative;
- rounds <= |Theta|, and the cost |Theta|^2 (log|Theta| + |theta|^2 + T_fit) + labels per round;
- some rounds were done again on the enlarged data ("replay"); regression can be cast to classes.

Ours, where the sources are silent:

- "ordered" is ascending, so that "the first element" is the worst set. A set is the sequence of
  its (name, value) pairs without the seed. Its longest common subsequence with each other set is
  found; the longest of these (between equals: the one with the worst-scoring set) is the common
  part; every set that contains it goes, with the worst. The round's best stays while others do.
  `worst-only` and `halving` (drop the lower half) are alternatives;
- one image per mistake; an image equal to a row of dev, test or the current train is drawn again;
- every fit starts from the initial state; a warm start from the best model so far is an option;
- ties: a later round wins (it saw more data), then the earlier set of the space;
- the loop also ends when the round's best makes no mistake, or after `max_rounds`;
- balancing drops new images of a class whose share would pass 1 / classes + tolerance;
- regression counts a prediction as a mistake when it falls into another bin than its label;
- choosing images at random instead of from mistakes, which is there to measure what they add;
- what is kept on disk, and that a killed run resumes to the result of an uninterrupted one.

Scores on the dev set are selected on in every round: report results on a test set only.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import warnings
import zlib
from typing import (
    Any,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
)

import numpy as np

from bort.config import option
from bort.errors import UserError

Theta = Mapping[str, Any]
TIMAEUS_ACCURACY = 2 / 3  # the author's bound: a labeller must be better than this
IMBALANCE = 0.5  # a class share this far from an equal share, relatively, is worth a warning


class EmptySearchSpaceError(UserError):
    """The search space holds no set of hyperparameters."""


class DevInTrainError(UserError):
    """A row of the dev set is in the training set."""


class TestEqualsDevError(UserError):
    """The test set holds the same rows as the dev set."""


class OtherRunError(UserError):
    """The store holds the records of a run with other arguments or data."""


class WeakTimaeusWarning(UserWarning):
    """Timaeus' accuracy on the dev set is not above 2/3."""


class ImbalanceWarning(UserWarning):
    """A class has far more or far fewer rows than an equal share."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labelled examples: n inputs of any kind, and labels as an array of shape [n]."""

    inputs: Sequence[Any]
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.inputs)

    def plus(self, other: Examples) -> Examples:
        """Return these examples followed by the others."""
        inputs = [*self.inputs, *other.inputs]
        return Examples(inputs, np.concatenate([self.labels, other.labels]))


class Socrates(Protocol):
    """The candidate: how to fit it and how to predict with it.

    A fit has to be determined by its arguments (the seed is part of `theta`), or runs with one
    seed differ. A warm start calls `fit(dataset, theta, start=model)` with the best model so far.
    """

    fit: Callable[..., Any]  # (dataset: Examples, theta: Theta) -> model

    def predict(self, model: Any, inputs: Sequence[Any]) -> np.ndarray:
        """Return the model's labels of n inputs, shape [n]."""


class Timaeus(Protocol):
    """The labeller of new examples; it has to be right more often than 2 times in 3."""

    def label(self, inputs: Sequence[Any]) -> np.ndarray:
        """Return labels of n inputs, shape [n] (real values for regression)."""


class Tau(Protocol):
    """The generator of new examples."""

    def __call__(self, example: Any, generator: np.random.Generator) -> Any:
        """Return another example near `example`, neither too near nor too far."""


@dataclasses.dataclass(frozen=True)
class Jitter:
    """The tau-function for vectors: a step in a random direction.

    The step's length is uniform between `lower` and `upper`, in the units of the inputs.
    """

    lower: float
    upper: float

    def __call__(self, example: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return a point of the example's shape, at a distance in [lower, upper] from it."""
        direction = generator.standard_normal(np.shape(example))
        length = generator.uniform(self.lower, self.upper)
        return np.asarray(example) + direction * (length / np.linalg.norm(direction))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is scored, and which values count as the same answer.

    `score(labels, predictions)` is a number, higher is better. `classes(values)` maps labels or
    predictions [n] to classes [n]: a prediction in another class than its label is a mistake, and
    balance and Timaeus' accuracy are about classes.
    """

    score: Callable[[np.ndarray, np.ndarray], float]
    classes: Callable[[np.ndarray], np.ndarray]


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of equal entries."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def negative_squared_error(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return minus the mean squared error."""
    return -float(np.mean((np.asarray(labels) - np.asarray(predictions)) ** 2))


def classification(score: Callable[[np.ndarray, np.ndarray], float] = accuracy) -> Objective:
    """Return the objective for two or more classes; labels are the classes."""
    return Objective(score, np.asarray)


def regression(
    edges: Sequence[float],
    score: Callable[[np.ndarray, np.ndarray], float] = negative_squared_error,
) -> Objective:
    """Return the objective for real labels, binned at the increasing `edges` into classes."""
    return Objective(score, functools.partial(np.digitize, bins=np.asarray(edges)))


@dataclasses.dataclass(frozen=True)
class AgoraSettings:
    """How Agora goes through its rounds."""

    max_rounds: Optional[int] = option(
        None, "stop after this many rounds (default: when no set is left)", minimum=1
    )
    replay: int = option(0, "do each round again this often on the enlarged data", minimum=0)
    warm_start: bool = option(False, "start each fit from the best model so far")
    prune: str = option(
        "lcs",
        "sets that a round drops: those that share the longest common sequence with the worst, "
        "the worst only, or the lower half",
        choices=("lcs", "worst-only", "halving"),
    )
    images_per_mistake: int = option(1, "new examples for each mistake and round", minimum=1)
    image_attempts: int = option(10, "draws before a mistake is left without image", minimum=1)
    images_from: str = option(
        "mistakes",
        "dev examples to make images of: the round's mistakes, or as many at random",
        choices=("mistakes", "random"),
    )
    balance: Optional[float] = option(
        None,
        "drop new examples of a class whose share would pass 1 / classes + this (default: keep)",
        minimum=0,
        maximum=1,
    )


@dataclasses.dataclass(frozen=True)
class TauImage:
    """A tau-image: the place in dev it comes from, its input, Timaeus' label, and its fate.

    Two images compare equal whatever their inputs, which need not be comparable.
    """

    source: int
    input: Any = dataclasses.field(compare=False)
    label: Any
    kept: bool


@dataclasses.dataclass(frozen=True)
class Round:
    """What happened in one round, or in one replay of it.

    Sets are named by their place in the search space. `scores` has the order of `space`;
    `best_score` is the best so far, this round included; `mistakes` are places in dev;
    `train_size` and `label_counts` describe the data that the fits saw; `seconds` are those spent
    in fits, summed over workers.
    """

    number: int
    replay: int
    space: Tuple[int, ...]
    scores: Tuple[float, ...]
    best: int
    best_score: float
    mistakes: Tuple[int, ...]
    images: Tuple[TauImage, ...]
    pruned: Tuple[int, ...]
    train_size: int
    label_counts: Mapping[str, int]
    seconds: float = dataclasses.field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the record for JSON: images are counted, scores that are no number are None."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["scores"] = [score if math.isfinite(score) else None for score in self.scores]
        record["best_score"] = self.best_score if math.isfinite(self.best_score) else None
        record["images"] = {
            "made": len(self.images),
            "kept": sum(image.kept for image in self.images),
        }
        return record


@dataclasses.dataclass(frozen=True)
class Best:
    """The best fit: its set (and the set's place in the space), its round, dev score and model."""

    theta: Theta
    place: int
    round: int
    replay: int
    score: float
    model: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class AgoraResult:
    """The best fit ever seen, and the record of every round."""

    best: Best
    rounds: List[Round]


class Store(Protocol):
    """Where a run keeps its fits: a JSON record for each, and the models that still matter.

    A record is written after the model that it may make the best, and a model is dropped after
    the record that supersedes it, so that a run killed between any two calls can go on.
    """

    def recall(self, name: str) -> Any:
        """Return the record kept under `name`, or None."""

    def record(self, name: str, content: Any) -> None:
        """Keep JSON content under `name`."""

    def save_model(self, name: str, model: Any) -> None:
        """Keep a model under `name`."""

    def load_model(self, name: str) -> Any:
        """Return the model kept under `name`."""

    def drop_model(self, name: str) -> None:
        """Forget the model under `name`; does nothing when there is none."""


class MemoryStore:
    """A `Store` that lasts as long as the process."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.models: dict[str, Any] = {}

    def recall(self, name: str) -> Any:
        """See `Store`."""
        return self.records.get(name)

    def record(self, name: str, content: Any) -> None:
        """See `Store`."""
        self.records[name] = content

    def save_model(self, name: str, model: Any) -> None:
        """See `Store`."""
        self.models[name] = model

    def load_model(self, name: str) -> Any:
        """See `Store`."""
        return self.models[name]

    def drop_model(self, name: str) -> None:
        """See `Store`."""
        self.models.pop(name, None)


class DiskStore:
    """A `Store` in a folder: `journal.jsonl` with a line for each record, and `models/`.

    `write_model(path, model)` and `read_model(path)` know the models' format; a model may be a
    file or a folder. A line that a crash cut short is removed; any other line that is not a
    record raises `UserError`.
    """

    def __init__(
        self,
        folder: str,
        write_model: Callable[[str, Any], None],
        read_model: Callable[[str], Any],
    ) -> None:
        self.models = os.path.join(folder, "models")
        self.journal = os.path.join(folder, "journal.jsonl")
        self.write_model, self.read_model = write_model, read_model
        os.makedirs(self.models, exist_ok=True)
        self.records = dict(self._read_journal())

    def _read_journal(self) -> Iterator[tuple[str, Any]]:
        if not os.path.exists(self.journal):
            return
        with open(self.journal, "rb+") as handle:
            whole, newline, _ = handle.read().rpartition(b"\n")
            handle.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                yield record["name"], record["content"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.journal}, line {number}: is no record of a fit; "
                    "restore the file, or start again in an empty folder"
                ) from None

    def recall(self, name: str) -> Any:
        """See `Store`."""
        return self.records.get(name)

    def record(self, name: str, content: Any) -> None:
        """See `Store`."""
        with open(self.journal, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"name": name, "content": content}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.records[name] = content

    def save_model(self, name: str, model: Any) -> None:
        """See `Store`; the model appears under its name whole or not at all."""
        path = self._path(name)
        temporary = f"{path}.tmp"
        _remove(temporary)
        self.write_model(temporary, model)
        _remove(path)
        os.replace(temporary, path)

    def load_model(self, name: str) -> Any:
        """See `Store`."""
        return self.read_model(self._path(name))

    def drop_model(self, name: str) -> None:
        """See `Store`."""
        _remove(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.models, name)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def grid(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the values, the last name's changing fastest."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def input_key(example: Any) -> Hashable:
    """Return a key that equal inputs share: arrays and lists compare by value, dicts by item."""
    if isinstance(example, (np.ndarray, np.generic)):
        return input_key(example.tolist())
    if isinstance(example, (list, tuple)):
        return tuple(map(input_key, example))
    if isinstance(example, dict):
        return tuple(sorted((name, input_key(value)) for name, value in example.items()))
    return example


def longest_common_subsequence(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Return the longest sequence that both contain in order, gaps allowed, in O(n m)."""
    longest: list[list[Any]] = [[] for _ in range(len(second) + 1)]
    for item in first:
        previous = longest
        longest = [[]]
        for place, other in enumerate(second):
            if item == other:
                longest.append([*previous[place], item])
            else:
                longest.append(max(longest[place], previous[place + 1], key=len))
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
    return {place for place, sequence in enumerate(sequences) if _contains(sequence, common)}


def dropped(order: Sequence[int], search_space: Sequence[Theta], strategy: str) -> list[int]:
    """Return the sets that a round drops, worst first; names of sets are places in the space.

    `order` lists the current sets from worst to best. At least one set goes, and the last one in
    `order` only when it is alone.
    """
    if strategy == "halving":
        places = set(range(len(order) // 2))
    elif strategy == "lcs":
        thetas = (search_space[name] for name in order)
        places = _common_with_worst(
            [[item for item in theta.items() if item[0] != "seed"] for theta in thetas]
        )
    else:
        places = {0}
    places = (places | {0}) - ({len(order) - 1} if len(order) > 1 else set())
    return [order[place] for place in sorted(places)]


def within_balance(
    present: np.ndarray,
    new: np.ndarray,
    classes: Sequence[Any],
    tolerance: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Choose new rows so that no class that gains rows has more than 1 / classes + tolerance.

    `present` [n] and `new` [m] are the classes of the rows there are and of those to add. Returns
    a mask [m] with as many True as the limit allows; which rows of a class are left out is drawn.
    """
    limit = 1 / len(classes) + tolerance + 1e-9
    have = np.array([np.sum(present == one) for one in classes])
    quota = np.array([np.sum(new == one) for one in classes])
    over = np.ones(len(classes), bool)
    while over.any():  # less of one class lowers the limits of all: until nothing changes
        over = (quota > 0) & (have + quota > limit * (have.sum() + quota.sum()))
        quota = quota - over
    keep = np.zeros(len(new), bool)
    for one, count in zip(classes, quota):
        keep[generator.permutation(np.flatnonzero(new == one))[:count]] = True
    return keep


def generator_for(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return the generator of one purpose, so that no draw depends on what was drawn before."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])


def agora(
    socrates: Socrates,
    timaeus: Timaeus,
    train: Examples,
    dev: Examples,
    search_space: Sequence[Theta],
    tau: Tau,
    settings: AgoraSettings = AgoraSettings(),  # noqa: B008  frozen, so safe to share
    *,
    seed: int = 0,
    objective: Objective = classification(),  # noqa: B008  likewise
    test_inputs: Sequence[Any] = (),
    store: Optional[Store] = None,
    map_fits: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
    on_round: Callable[[Round], None] = lambda record: None,
) -> AgoraResult:
    """Fit the candidate on scarce data (see the module's docstring for the algorithm).

    `test_inputs` are never predicted: they are kept out of train, and dev must not equal them.
    `store` remembers fits: given the store of a killed run, the run goes on to the same result;
    `max_rounds` alone may be changed. `map_fits(function, tasks)` may spread the fits of a round
    over workers and return their results in any order; `function`, tasks and results can be
    pickled when the socrates, its models and the examples can. `on_round` sees each round's
    record, those recalled from the store included.

    Raises `EmptySearchSpaceError`, `DevInTrainError`, `TestEqualsDevError` or `OtherRunError`
    before any fit; warns `WeakTimaeusWarning` and `ImbalanceWarning`, which
    `warnings.simplefilter("error", ...)` turns into errors.
    """
    _check_data(train, dev, search_space, test_inputs)
    _check_labels(timaeus, train, dev, objective)
    store = store or MemoryStore()
    _check_store(store, seed, settings, search_space, train, dev)
    run = _Run(
        socrates, timaeus, dev, search_space, tau, settings, seed, objective, store, map_fits
    )
    rounds = []
    for record in run.rounds(train, {input_key(example) for example in test_inputs}):
        rounds.append(record)
        on_round(record)
    return AgoraResult(run.best_fit(), rounds)


def _check_data(
    train: Examples, dev: Examples, search_space: Sequence[Theta], test_inputs: Sequence[Any]
) -> None:
    if not search_space:
        raise EmptySearchSpaceError("the search space is empty: give at least one set")
    if not len(train) or not len(dev):
        raise UserError(f"train has {len(train)} and dev {len(dev)} rows: both need at least one")
    places = {input_key(example): place for place, example in enumerate(dev.inputs)}
    for row, example in enumerate(train.inputs):
        if input_key(example) in places:
            raise DevInTrainError(
                f"row {row} of train is row {places[input_key(example)]} of dev: "
                "remove it from one of them"
            )
    if test_inputs and {input_key(example) for example in test_inputs} == set(places):
        raise TestEqualsDevError(
            "the test set holds the rows of dev, which Agora selects on: give a test set apart"
        )


def _check_labels(timaeus: Timaeus, train: Examples, dev: Examples, objective: Objective) -> None:
    truth = objective.classes(dev.labels)
    share = accuracy(truth, objective.classes(np.asarray(timaeus.label(dev.inputs))))
    if share <= TIMAEUS_ACCURACY:
        warnings.warn(
            f"Timaeus labels {share:.3f} of dev correctly; Agora needs more than 2/3",
            WeakTimaeusWarning,
            stacklevel=3,
        )
    known = objective.classes(train.labels)
    every = np.unique(np.concatenate([known, truth]))
    for name, classes in (("train", known), ("dev", truth)):
        for one in every:
            ratio = float(np.mean(classes == one)) * len(every)
            if abs(ratio - 1) > IMBALANCE:
                warnings.warn(
                    f"class {one} has {ratio:.2f} times an equal share of {name}'s rows; "
                    "see the setting balance",
                    ImbalanceWarning,
                    stacklevel=3,
                )


def _check_store(
    store: Store,
    seed: int,
    settings: AgoraSettings,
    search_space: Sequence[Theta],
    train: Examples,
    dev: Examples,
) -> None:
    arguments = {"seed": seed, **dataclasses.asdict(settings), "search_space": search_space}
    del arguments["max_rounds"]  # decides where the run ends, not how it goes
    arguments.update(train=_digest(train), dev=_digest(dev))
    arguments = json.loads(json.dumps(arguments, default=repr))
    kept = store.recall("run")
    if kept is None:
        store.record("run", arguments)
    elif kept != arguments:
        names = [name for name, value in arguments.items() if kept.get(name) != value]
        raise OtherRunError(
            f"the store holds a run with another {', '.join(names)}: use a new folder"
        )


def _digest(examples: Examples) -> str:
    digest = hashlib.sha256()
    for example, label in zip(examples.inputs, examples.labels.tolist()):
        digest.update(repr((input_key(example), label)).encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Task:
    """One fit of a round: everything a worker needs but the socrates and the data."""

    place: int
    theta: Theta


@dataclasses.dataclass(frozen=True)
class _Fit:
    place: int
    model: Any
    predictions: list[Any]
    seconds: float


def _fit(socrates: Socrates, data: Examples, inputs: Sequence[Any], warm: dict, task: _Task) -> _Fit:
    """Fit one set and predict dev; a function of the module, so that processes can run it."""
    start = time.perf_counter()
    model = socrates.fit(data, task.theta, **warm)
    predictions = np.asarray(socrates.predict(model, inputs))
    if predictions.shape != (len(inputs),):
        raise ValueError(f"predict returned shape {predictions.shape} for {len(inputs)} inputs")
    return _Fit(task.place, model, predictions.tolist(), time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class _Leader:
    """The best fit so far; of two, the greater `rank` wins."""

    score: float
    step: int
    place: int

    @property
    def rank(self) -> tuple[float, int, int]:
        return self.score, self.step, -self.place

    @property
    def name(self) -> str:
        return _name(self.step, self.place)


def _name(step: int, place: int) -> str:
    return f"fit-{step:04d}-{place:04d}"


@dataclasses.dataclass
class _Run:
    """One run; a *step* is a round or a replay of one."""

    socrates: Socrates
    timaeus: Timaeus
    dev: Examples
    search_space: Sequence[Theta]
    tau: Tau
    settings: AgoraSettings
    seed: int
    objective: Objective
    store: Store
    map_fits: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
    leader: Optional[_Leader] = None

    def rounds(self, data: Examples, forbidden: set[Hashable]) -> Iterator[Round]:
        """Go through the rounds; `forbidden` are keys that no image may have."""
        forbidden = forbidden | {input_key(example) for example in self.dev.inputs}
        space = list(range(len(self.search_space)))
        for step in self._steps():
            fits = self._fit_all(step, space, data)
            scores = {place: self._score(fits[place]["predictions"]) for place in space}
            # Of sets with one score the earliest counts as the best.
            order = sorted(space, key=lambda place: (scores[place], -place))
            mistakes = self._mistakes(fits[order[-1]]["predictions"])
            images = self._images(step, mistakes, data, forbidden)
            replays_left = (step + 1) % (self.settings.replay + 1)
            pruned = (
                []
                if replays_left or not mistakes
                else dropped(order, self.search_space, self.settings.prune)
            )
            yield self._record(step, space, scores, order[-1], mistakes, images, pruned, data, fits)
            space = [place for place in space if place not in pruned]
            if not space or not mistakes:
                return
            data = _enlarged(data, images)
