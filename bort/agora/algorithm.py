"""Agora: fine-tuning when training data is scarce or biased (A. de Wynter, arXiv 2010.07990).

A candidate model (*Socrates*) is fitted once for every set of hyperparameters in a search space.
Examples of the dev set that the best fit predicts wrongly are perturbed by a *tau-function*,
labelled by a moderately accurate model (*Timaeus*) and appended to the training set; the least
promising sets are dropped. This is repeated until no set is left. The loop knows nothing about
models, text or frameworks: it needs the three small protocols below and NumPy.

From the sources - [P] the paper's abstract and first page, [A] its author's post about the trilogy,
[R] the README of the code released with Bort:

- a trained labeller, a candidate, a train and an evaluation set, a search space and a function
  that makes data; the search space is searched and pruned round by round; the choice of the best
  is greedy [P];
- every round fits all sets and scores them on the evaluation set; new examples are made near the
  best fit's mistakes there, labelled by the trained model and appended to train; the evaluation
  set itself never enters train [A];
- the sets are ordered by score and those in the longest common sequence rooted at the first
  element are removed; the loop ends when the space is empty [A];
- |Theta| rounds, so |Theta|^2 (log|Theta| + |theta|^2 + T_fit) + labels of |Theta| |dev| rows [P];
- tau(x) is near x, with a lower and an upper bound on the distance [A];
- the labeller has to be better than 2/3; labels should be balanced, by artificial means if need
  be; the evaluation set has to be representative; regression can be cast to classes [A];
- some rounds were done again ("replay") [R]; its recommended space is the 480 sets [R].

Ours, where those are silent (the text of the algorithm itself was not available, and the origin of
the names Socrates, Timaeus and tau was not checked):

- "ordered" is ascending, so that "the first element" is the worst set. A set is the sequence of
  its (name, value) pairs without the seed and what the whole space shares. Its longest common
  subsequence with each other set is found; the longest of these (of equals, the one with the
  worst-scoring set) is the common part; all sets that contain it are dropped, with the worst. The
  best set of the round stays while others do. `worst-only` and `halving` (drop the lower half) are
  alternatives;
- one augmented example per mistake, none in the last round, after which nothing is fitted; one that
  equals a row of dev, test or the current train is drawn again;
- every fit starts from the initial state; a warm start from the best model so far is an option;
- ties: a later round wins (it saw more data), then the earlier set of the space;
- the loop also ends when the round's best makes no mistake, or after `max_rounds`;
- balancing drops augmented examples of a class whose share would exceed 1 / classes + tolerance;
- in regression a prediction is a mistake when it falls into another bin than its label;
- augmenting random rows instead of mistakes, to measure what the mistakes contribute;
- what is stored, and that an interrupted run resumes to the result of an uninterrupted one.

Sets are selected by their scores on dev in every round: report results on a test set only.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
import warnings
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

from bort.agora.pruning import sets_to_drop, within_balance
from bort.agora.store import Store
from bort.config import check_limits, option
from bort.errors import UserError
from bort.generators import generator_for
from bort.types import Hyperparameters, JSONMapping, JSONObject
from data.metrics import accuracy

Input = Any  # a text, a tuple of texts, or what a Socrates of the caller takes
Label = Any  # a class as str or int; a float in regression
Model = Any  # what `Socrates.fit` returns
MapFits = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
TIMAEUS_ACCURACY = 2 / 3  # the author's bound: a labeller must be better than this
FIT = "fit-"  # begins the name of a fit in a store
# The entry of a run's record which says that pruning ignores what the whole space shares. A run
# without it was begun by an earlier version, and is pruned as it began.
CONSTANTS = "constants"
IMBALANCE = 0.5  # a class share this far from an equal share, relatively, is worth a warning


class EmptySearchSpaceError(UserError):
    """The search space is empty."""


class DevInTrainError(UserError):
    """A row of the dev set is in the training set."""


class TestEqualsDevError(UserError):
    """The test set has the rows of the dev set."""


class OtherRunError(UserError):
    """The store contains the records of a run with other arguments or data."""


class WeakTimaeusWarning(UserWarning):
    """The accuracy of Timaeus on the dev set is not above 2/3."""


class ImbalanceWarning(UserWarning):
    """A class has far more or far fewer rows than an equal share."""


class SingleSetWarning(UserWarning):
    """The search space has one set: the run ends before augmented examples could be used."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labelled examples: n inputs of any kind, and labels as an array of shape [n]."""

    inputs: Sequence[Input]
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.inputs)

    def plus(self, added: Sequence[AugmentedExample]) -> Examples:
        """Return these examples followed by augmented ones."""
        if not added:
            return self
        labels = np.array([example.label for example in added])
        inputs = [*self.inputs, *(example.input for example in added)]
        return Examples(inputs, np.concatenate([self.labels, labels]))


class Socrates(Protocol):
    """The candidate: how to fit it and how to predict with it.

    A fit has to be determined by its arguments (the seed is one of the hyperparameters); else runs
    with the same seed differ. `start` is passed in warm starts only.
    """

    def fit(
        self, dataset: Examples, hparams: Hyperparameters, start: Optional[Model] = None
    ) -> Model:
        """Return the model fitted from its initial state, or from the model `start`."""

    def predict(self, model: Model, inputs: Sequence[Input]) -> np.ndarray:
        """Return the model's labels of n inputs, shape [n]."""


class Timaeus(Protocol):
    """The labeller of augmented examples; its accuracy has to be above 2/3."""

    def label(self, inputs: Sequence[Input]) -> np.ndarray:
        """Return labels of n inputs, shape [n] (real values for regression)."""


class Tau(Protocol):
    """The function that perturbs examples."""

    def __call__(self, example: Input, generator: np.random.Generator) -> Input:
        """Return another example near `example`, neither too near nor too far."""


@dataclasses.dataclass(frozen=True)
class Jitter:
    """A tau-function for vectors: a step in a random direction.

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
    """How predictions are scored, and which values count as the same class.

    `score(labels, predictions)` is a number, higher is better. `classes(values)` maps labels or
    predictions [n] to classes [n]: a prediction in another class than its label is a mistake, and
    balance and Timaeus' accuracy are those of classes. `name(class)` is how messages call one.
    """

    score: Callable[[np.ndarray, np.ndarray], float]
    classes: Callable[[np.ndarray], np.ndarray]
    name: Callable[[Any], str] = str


def negative_squared_error(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return minus the mean squared error."""
    return -float(np.mean((np.asarray(labels) - np.asarray(predictions)) ** 2))


CLASSIFICATION = Objective(accuracy, np.asarray)  # two or more classes; `score` may be replaced


def regression(
    edges: Sequence[float],
    score: Callable[[np.ndarray, np.ndarray], float] = negative_squared_error,
) -> Objective:
    """Return the objective for real labels, binned at the increasing `edges` into classes."""

    def classes(values: np.ndarray) -> np.ndarray:
        return np.digitize(values, edges)  # type: ignore[return-value]  # typed as a scalar

    def name(number: int) -> str:
        bounds = [-math.inf, *edges, math.inf]
        return f"{bounds[number]:g} to {bounds[number + 1]:g}"

    return Objective(score, classes, name)


@dataclasses.dataclass(frozen=True)
class AgoraSettings:
    """The rounds of Agora."""

    max_rounds: Optional[int] = option(
        None, "maximum number of rounds (default: until no set is left)", minimum=1
    )
    replay: int = option(0, "repeats of each round on the augmented data", minimum=0)
    warm_start: bool = option(False, "start each fit from the best model so far")
    prune: str = option(
        "lcs",
        "sets that a round drops: those that contain the longest common subsequence with the worst "
        "set, the worst set only, or the lower half",
        choices=("lcs", "worst-only", "halving"),
    )
    images_per_mistake: int = option(1, "augmented examples per mistake and round", minimum=1)
    image_attempts: int = option(10, "draws before a mistake is skipped", minimum=1)
    images_from: str = option(
        "mistakes",
        "dev examples to augment: the mistakes of the round, or as many at random",
        choices=("mistakes", "random"),
    )
    balance: Optional[float] = option(
        None,
        "drop augmented examples of a class whose share would exceed 1 / classes + this "
        "(default: keep all)",
        minimum=0,
        maximum=1,
    )


@dataclasses.dataclass(frozen=True)
class AugmentedExample:
    """An example that the tau-function made, with Timaeus' label.

    Inputs are not compared: they need not be comparable.
    """

    source: int  # index in dev of the example that it was made of
    input: Input = dataclasses.field(compare=False)
    label: Label
    kept: bool  # False: dropped by balancing


@dataclasses.dataclass(frozen=True)
class Round:
    """The record of one round, or of one replay of it.

    Sets are named by their index in the search space. `scores` has the order of `space`;
    `best_score` is the best so far, including this round; `mistakes` are indices in dev;
    `train_size` and `label_counts` describe the data of the fits; `seconds` is the time of the
    fits, summed over workers.
    """

    number: int
    replay: int
    space: Tuple[int, ...]
    scores: Tuple[float, ...]
    best: int
    best_score: float
    mistakes: Tuple[int, ...]
    augmented: Tuple[AugmentedExample, ...]
    pruned: Tuple[int, ...]
    train_size: int
    label_counts: Mapping[str, int]
    seconds: float = dataclasses.field(compare=False)

    def as_dict(self) -> JSONObject:
        """Return the record for JSON: augmented examples as counts, NaN and infinity as None."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["scores"] = [score if math.isfinite(score) else None for score in self.scores]
        record["best_score"] = self.best_score if math.isfinite(self.best_score) else None
        del record["augmented"]
        record["images"] = {
            "made": len(self.augmented),
            "kept": sum(example.kept for example in self.augmented),
        }
        return record


@dataclasses.dataclass(frozen=True)
class Best:
    """The best fit: its set and the set's index in the space, its round, dev score and model."""

    hparams: Hyperparameters
    index: int
    round: int
    replay: int
    score: float
    model: Model = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class AgoraResult:
    """The best fit of all rounds, and the record of every round."""

    best: Best
    rounds: List[Round]


def input_key(example: Input) -> Hashable:
    """Return a key that equal inputs share: arrays and lists by value, dicts by item.

    Arrays of other libraries, such as MXNet's, are equal to themselves only: they become NumPy's.
    """
    if hasattr(example, "asnumpy"):
        return input_key(example.asnumpy().tolist())
    if hasattr(example, "__array__"):
        return input_key(np.asarray(example).tolist())
    if isinstance(example, (list, tuple)):
        return tuple(map(input_key, example))
    if isinstance(example, dict):
        return tuple(sorted((name, input_key(value)) for name, value in example.items()))
    return example


def agora(
    socrates: Socrates,
    timaeus: Timaeus,
    train: Examples,
    dev: Examples,
    search_space: Sequence[Hyperparameters],
    tau: Tau,
    settings: Optional[AgoraSettings] = None,
    *,
    seed: int = 0,
    objective: Objective = CLASSIFICATION,
    test_inputs: Sequence[Input] = (),
    store: Optional[Store] = None,
    map_fits: MapFits = map,
    on_round: Callable[[Round], None] = lambda record: None,
) -> AgoraResult:
    """Fit the candidate on scarce data (see the module's docstring for the algorithm).

    `test_inputs` are never predicted: they are kept out of train, and dev must not equal them.
    `store` records fits: given the store of an interrupted run, the run is resumed and gives the
    same result; only `max_rounds` may differ. `map_fits(function, tasks)` may distribute the fits
    of a round over workers and return the results in any order; `function`, tasks and results can
    be pickled when the socrates, its models and the examples can. `on_round` gets the record of
    each round, including those recalled from the store.

    Raises `EmptySearchSpaceError`, `DevInTrainError`, `TestEqualsDevError`, `OtherRunError`, or
    `ValueError` for a negative `seed`, before any fit; warns `WeakTimaeusWarning`,
    `ImbalanceWarning` and `SingleSetWarning`, which `warnings.simplefilter("error", ...)` turns
    into errors.
    """
    if seed < 0:  # NumPy's generators take none
        raise ValueError(f"seed {seed}: must not be negative")
    settings = settings or AgoraSettings()
    check_limits(settings)
    test_inputs = list(test_inputs)  # a generator would be empty after the first check
    _check_data(train, dev, search_space, test_inputs)
    _check_labels(timaeus, train, dev, objective)
    if len(search_space) == 1 and not settings.replay:
        text = "the search space has one set, which the first round drops: no examples are added"
        _warn(SingleSetWarning, f"{text}; give more sets, or set replay", stacklevel=3)
    store = Store() if store is None else store
    _check_store(store, seed, settings, search_space, train, dev)
    fitting = _Fitting(socrates, dev, search_space, objective, store, map_fits, settings.warm_start)
    _check_max_rounds(fitting, settings)
    augmentation = _Augmentation(timaeus, dev, tau, objective, settings, seed, test_inputs)
    rounds = []
    for record in _rounds(fitting, augmentation, train, settings):
        rounds.append(record)
        on_round(record)
    best = fitting.best()
    number, replay = divmod(best.step, settings.replay + 1)
    model = store.load_model(best.name)
    hparams = search_space[best.index]
    return AgoraResult(Best(hparams, best.index, number, replay, best.score, model), rounds)


def _rounds(
    fitting: _Fitting, augmentation: _Augmentation, data: Examples, settings: AgoraSettings
) -> Iterator[Round]:
    """Yield the rounds. A *step* is a round or a replay; it keys fits and augmented examples."""
    space = list(range(len(fitting.search_space)))
    passes, limit = settings.replay + 1, settings.max_rounds
    steps = limit and limit * passes
    constants_count = CONSTANTS not in fitting.store.recall("run")
    for step in itertools.islice(itertools.count(), steps):
        fits = fitting.fit_all(step, space, data)
        mistakes = augmentation.mistakes(fits[-1].predictions)
        pruned: list[int] = []
        if mistakes and (step + 1) % passes == 0:
            order = [fit.index for fit in fits]
            pruned = sets_to_drop(order, fitting.search_space, settings.prune, constants_count)
        # Nothing would be fitted on the augmented data.
        last = len(pruned) == len(space) or step + 1 == steps
        augmented = [] if last else augmentation.augment(step, mistakes, data)
        by_index = sorted(fits, key=lambda fit: fit.index)
        yield Round(
            number=step // passes,
            replay=step % passes,
            space=tuple(fit.index for fit in by_index),
            scores=tuple(fit.score for fit in by_index),
            best=fits[-1].index,
            best_score=fitting.best().score,
            mistakes=tuple(mistakes),
            augmented=tuple(augmented),
            pruned=tuple(pruned),
            train_size=len(data),
            label_counts=augmentation.label_counts(data),
            seconds=sum(fit.seconds for fit in fits),
        )
        space = [index for index in space if index not in pruned]
        if not space or not mistakes:
            return
        data = data.plus([example for example in augmented if example.kept])


def _check_data(
    train: Examples,
    dev: Examples,
    search_space: Sequence[Hyperparameters],
    test_inputs: Sequence[Input],
) -> None:
    if not search_space:
        raise EmptySearchSpaceError("the search space is empty: give at least one set")
    if not len(train) or not len(dev):
        raise UserError(f"train has {len(train)} and dev {len(dev)} rows: both need at least one")
    rows = {input_key(example): row for row, example in enumerate(dev.inputs)}
    for row, example in enumerate(train.inputs):
        if input_key(example) in rows:
            raise DevInTrainError(
                f"row {row} of train is row {rows[input_key(example)]} of dev: "
                "remove it from one of them"
            )
    if set(map(input_key, test_inputs)) == set(rows):
        raise TestEqualsDevError(
            "the test set contains the rows of dev, on which Agora selects: give another test set"
        )


def _check_labels(timaeus: Timaeus, train: Examples, dev: Examples, objective: Objective) -> None:
    labels = np.asarray(timaeus.label(dev.inputs))
    _check_shape("label", labels, dev.inputs)
    in_train, in_dev = objective.classes(train.labels), objective.classes(dev.labels)
    share = accuracy(in_dev, objective.classes(labels))
    if share <= TIMAEUS_ACCURACY:
        _warn(
            WeakTimaeusWarning,
            f"the accuracy of Timaeus on dev is {share:.3f}; it should be above 2/3",
        )
    all_classes = np.unique(np.concatenate([in_train, in_dev]))
    for name, classes in (("train", in_train), ("dev", in_dev)):
        for label in all_classes:
            ratio = float(np.mean(classes == label)) * len(all_classes)
            if abs(ratio - 1) > IMBALANCE:
                what = f"class {objective.name(label)} has {ratio:.2f} times an equal share"
                _warn(ImbalanceWarning, f"{what} of {name}; see the setting balance")


def _warn(category: type[Warning], text: str, stacklevel: int = 4) -> None:
    warnings.warn(text, category, stacklevel=stacklevel)  # the line that called `agora`


def _check_store(
    store: Store,
    seed: int,
    settings: AgoraSettings,
    search_space: Sequence[Hyperparameters],
    train: Examples,
    dev: Examples,
) -> None:
    arguments = {"seed": seed, **dataclasses.asdict(settings), "search_space": search_space}
    del arguments["max_rounds"]  # decides when the run ends, not its rounds
    arguments.update(train=_digest(train), dev=_digest(dev))
    arguments = json.loads(json.dumps(arguments, default=_plain))
    recorded = store.recall("run")
    if recorded is None:
        store.record("run", {**arguments, CONSTANTS: "ignored"})
    elif {**recorded, **arguments} != recorded:
        names = [name for name, value in arguments.items() if recorded.get(name) != value]
        raise OtherRunError(
            f"the store contains a run with another {', '.join(names)}: use a new folder"
        )


def _plain(value: Any) -> Any:
    """Return a number of NumPy as Python's, which is equal to it; anything else as text."""
    return value.item() if isinstance(value, np.generic) else repr(value)


def _check_max_rounds(fitting: _Fitting, settings: AgoraSettings) -> None:
    """Raise `OtherRunError` when fewer rounds are asked for and their best model is gone."""
    passes, recorded = settings.replay + 1, fitting.recorded()
    rounds = 1 + max((fit.step // passes for fit in recorded), default=-1)
    if settings.max_rounds is None or rounds <= settings.max_rounds:
        return
    wanted = [fit for fit in recorded if fit.step // passes < settings.max_rounds]
    if wanted and not fitting.store.has_model(max(wanted, key=lambda fit: fit.rank).name):
        raise OtherRunError(
            f"max_rounds {settings.max_rounds}: the run has {rounds} rounds, and the best model of "
            f"fewer is gone; give at least {rounds}, or use a new folder"
        )


def _digest(examples: Examples) -> str:
    digest = hashlib.sha256()
    for example, label in zip(examples.inputs, examples.labels.tolist()):
        digest.update(repr((input_key(example), label)).encode())
    return digest.hexdigest()


def _check_shape(name: str, labels: np.ndarray, inputs: Sequence[Input]) -> None:
    if labels.shape != (len(inputs),):
        raise ValueError(f"{name} returned shape {labels.shape} for {len(inputs)} inputs")


@dataclasses.dataclass(frozen=True)
class _Task:
    """One fit of a step, without the socrates and the data."""

    step: int
    index: int
    hparams: Hyperparameters


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """The result of a fit, as a worker returns it."""

    task: _Task
    model: Model
    predictions: List[Label]
    seconds: float


def _fit(
    socrates: Socrates,
    data: Examples,
    dev_inputs: Sequence[Input],
    warm: Mapping[str, Model],
    task: _Task,
) -> _Fitted:
    """Fit one set and predict dev; a function of the module, so that it can be pickled."""
    start = time.perf_counter()
    model = socrates.fit(data, task.hparams, **warm)
    predictions = np.asarray(socrates.predict(model, dev_inputs))
    _check_shape("predict", predictions, dev_inputs)
    return _Fitted(task, model, predictions.tolist(), time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The score and predictions of a fit on dev; the fit of the greatest rank is the best."""

    score: float
    step: int
    index: int
    predictions: List[Label]
    seconds: float

    @property
    def rank(self) -> tuple[float, int, int]:
        """The score; of equal ones the later round, and in a round the first fit."""
        return self.score, self.step, -self.index

    @property
    def name(self) -> str:
        """The name of its model in the store."""
        return fit_name(self.step, self.index)


def fit_name(step: int, index: int) -> str:
    """Return the name under which a store keeps the fit of a set in a step."""
    return f"{FIT}{step:04d}-{index:04d}"


@dataclasses.dataclass
class _Fitting:
    """Makes fits or recalls them from the store, which keeps the model of the best."""

    socrates: Socrates
    dev: Examples
    search_space: Sequence[Hyperparameters]
    objective: Objective
    store: Store
    map_fits: MapFits
    warm_start: bool
    leader: Optional[_Fit] = None

    def best(self) -> _Fit:
        """Return the best fit so far; there has to be one."""
        assert self.leader is not None
        return self.leader

    def fit_all(self, step: int, space: Sequence[int], data: Examples) -> list[_Fit]:
        """Return the fits of the sets in the space on the data, worst first."""
        before = self.leader
        digest = _digest(data)
        fits, tasks = [], []
        for index in space:
            record = self.store.recall(fit_name(step, index))
            if record is None or len(record["predictions"]) != len(self.dev):
                tasks.append(_Task(step, index, self.search_space[index]))
            else:
                fits.append(self._recalled(step, index, record, digest))
        if tasks:
            fits += self._fit_missing(tasks, data, digest, before)
        if before and before is not self.leader:  # not sooner: the warm start may still need it
            self.store.drop_model(before.name)
        return sorted(fits, key=lambda fit: fit.rank)

    def recorded(self) -> list[_Fit]:
        """Return the fits in the store, in any order."""
        found = []
        for name, record in self.store.records.items():
            if name.startswith(FIT) and len(record["predictions"]) == len(self.dev):
                step, index = map(int, name[len(FIT) :].split("-"))
                found.append(self._scored(step, index, record["predictions"], record["seconds"]))
        return found

    def _recalled(self, step: int, index: int, record: JSONMapping, digest: str) -> _Fit:
        if record["data"] != digest:
            raise OtherRunError(
                f"{fit_name(step, index)} in the store was fitted on other data: tau or Timaeus "
                "differ from those of the run to resume, or are not deterministic; use a new folder"
            )
        fit = self._scored(step, index, record["predictions"], record["seconds"])
        self._lead(fit)
        return fit

    def _fit_missing(
        self, tasks: Sequence[_Task], data: Examples, digest: str, before: Optional[_Fit]
    ) -> list[_Fit]:
        warm = {}
        if self.warm_start and before:
            if not self.store.has_model(before.name):
                raise UserError(
                    f"{fit_name(tasks[0].step, tasks[0].index)} has to be repeated, as its record "
                    f"is damaged, but the model that it started from, {before.name}, is gone; use "
                    "a new folder"
                )
            warm["start"] = self.store.load_model(before.name)
        function = functools.partial(_fit, self.socrates, data, self.dev.inputs, warm)
        return [self._keep(fitted, digest) for fitted in self.map_fits(function, tasks)]

    def _keep(self, fitted: _Fitted, digest: str) -> _Fit:
        task = fitted.task
        fit = self._scored(task.step, task.index, fitted.predictions, fitted.seconds)
        if self._leads(fit):
            self.store.save_model(fit.name, fitted.model)
        record = {"data": digest, "predictions": fit.predictions, "seconds": fit.seconds}
        self.store.record(fit.name, record)
        self._lead(fit)
        return fit

    def _scored(self, step: int, index: int, predictions: list[Label], seconds: float) -> _Fit:
        score = float(self.objective.score(self.dev.labels, np.asarray(predictions)))
        if math.isnan(score):  # the fit diverged: it ranks last
            score = -math.inf
        return _Fit(score, step, index, predictions, seconds)

    def _leads(self, fit: _Fit) -> bool:
        return self.leader is None or fit.rank > self.leader.rank

    def _lead(self, fit: _Fit) -> None:
        if self._leads(fit):
            former, self.leader = self.leader, fit
            if former and former.step == fit.step:
                self.store.drop_model(former.name)


@dataclasses.dataclass
class _Augmentation:
    """Finds mistakes, perturbs them by tau, and lets Timaeus label the results."""

    timaeus: Timaeus
    dev: Examples
    tau: Tau
    objective: Objective
    settings: AgoraSettings
    seed: int
    test_inputs: Sequence[Input]

    def __post_init__(self) -> None:
        self.kept_out = set(map(input_key, [*self.dev.inputs, *self.test_inputs]))

    def mistakes(self, predictions: list[Label]) -> list[int]:
        """Return the indices in dev whose prediction is of another class than the label."""
        classes = self.objective.classes
        wrong = classes(self.dev.labels) != classes(np.asarray(predictions))
        return np.flatnonzero(wrong).tolist()

    def label_counts(self, data: Examples) -> dict[str, int]:
        """Return the number of rows of each class."""
        counts = np.unique(self.objective.classes(data.labels), return_counts=True)
        return {str(label): int(count) for label, count in zip(*counts)}

    def augment(self, step: int, mistakes: list[int], data: Examples) -> list[AugmentedExample]:
        """Return labelled examples near the mistakes (or near as many random rows of dev)."""
        drawn = self._draw(step, self._sources(step, mistakes), data)
        if not drawn:
            return []
        inputs = [example for _, example in drawn]
        labels = np.asarray(self.timaeus.label(inputs))
        _check_shape("label", labels, inputs)
        keep = self._balance(step, data.labels, labels)
        return [
            AugmentedExample(source, example, label, kept)
            for (source, example), label, kept in zip(drawn, labels, keep.tolist())
        ]

    def _sources(self, step: int, mistakes: list[int]) -> list[int]:
        if self.settings.images_from == "mistakes":
            return mistakes
        generator = generator_for(self.seed, "sources", step)
        return generator.choice(len(self.dev), len(mistakes), replace=False).tolist()

    def _draw(self, step: int, sources: list[int], data: Examples) -> list[tuple[int, Any]]:
        taken = self.kept_out.union(map(input_key, data.inputs))
        drawn = []
        for source in sources:
            generator = generator_for(self.seed, "image", step, source)
            for _ in range(self.settings.images_per_mistake):
                for _ in range(self.settings.image_attempts):
                    # A copy: a tau that works in place must not change dev.
                    example = self.tau(copy.deepcopy(self.dev.inputs[source]), generator)
                    if input_key(example) not in taken:
                        taken.add(input_key(example))
                        drawn.append((source, example))
                        break
        return drawn

    def _balance(self, step: int, labels: np.ndarray, new_labels: np.ndarray) -> np.ndarray:
        if self.settings.balance is None:
            return np.ones(len(new_labels), bool)
        values = (labels, new_labels, self.dev.labels)
        present, new, in_dev = (self.objective.classes(labels) for labels in values)
        all_classes = np.unique(np.concatenate([present, new, in_dev]))
        generator = generator_for(self.seed, "balance", step)
        return within_balance(present, new, all_classes, self.settings.balance, generator)
