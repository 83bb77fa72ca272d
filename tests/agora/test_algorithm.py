"""Agora's loop on closed-form toys: its properties, its guards, and its resumption."""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from bort.agora import algorithm as module
from bort.agora.algorithm import AgoraSettings, Examples, Jitter, agora, input_key
from bort.agora.pruning import longest_common_subsequence
from bort.agora.store import DiskStore, Store
from bort.errors import UserError
from bort.files import lock_folder, temporary_name
from bort.grids import combinations
from bort.journal import line_of, record_of

SPACE = combinations({"degree": [1, 2, 3], "decay": [1e-3, 1.0], "seed": [0, 1]})
TAU = Jitter(0.05, 0.2)
STRATEGIES = ("lcs", "worst-only", "halving")


class Polynomial:
    """Socrates in closed form: ridge regression on a few random monomials, rounded to classes.

    Remembers the data of every fit, and the model that each fit started from.
    """

    def __init__(self, classes=(0, 1)):
        self.classes = np.array(classes)
        self.seen = []
        self.starts = []

    def fit(self, dataset, hparams, start=None):
        self.seen.append(dataset)
        self.starts.append(start)
        generator = np.random.default_rng(hparams["seed"])
        powers = generator.integers(0, hparams["degree"] + 1, (8, len(dataset.inputs[0])))
        features = self.features(dataset.inputs, powers)
        penalty = hparams["decay"] * np.eye(8)
        origin = np.zeros(8) if start is None else start[1]
        pull = features.T @ dataset.labels + penalty @ origin
        return powers, np.linalg.solve(features.T @ features + penalty, pull)

    @staticmethod
    def features(inputs, powers):
        return np.prod(np.stack(inputs)[:, None, :] ** powers[None], axis=2)

    def real(self, model, inputs):
        return self.features(inputs, model[0]) @ model[1]

    def predict(self, model, inputs):
        distance = np.abs(self.real(model, inputs)[:, None] - self.classes[None])
        return self.classes[np.argmin(distance, axis=1)]


class Constant(Polynomial):
    def predict(self, model, inputs):
        return np.ones(len(inputs), int)


class Regressor(Polynomial):
    def predict(self, model, inputs):
        return self.real(model, inputs)


class Rule:
    """Timaeus: a rule, and a count of what it labelled."""

    def __init__(self, rule):
        self.rule = rule
        self.calls = []

    def label(self, inputs):
        self.calls.append(list(inputs))
        return self.rule(np.stack(inputs))


def quadrants(x):
    return (x[:, 0] * x[:, 1] > 0).astype(int)


def wavy(x):
    """Nearly right: 5 in 6 of the plane agree with `quadrants`."""
    return (x[:, 0] * x[:, 1] > 0.15 * np.sin(9 * x[:, 0])).astype(int)


def points(rows, rule=quadrants, seed=0, low=-1.0):
    x = np.random.default_rng(seed).uniform([low, -1], 1, (rows, 2))
    return Examples(x, rule(x))


def noisy_dev(rows=40):
    """A dev set that no model gets quite right, so that mistakes never run out."""
    dev = points(rows, seed=1)
    labels = dev.labels.copy()
    labels[::8] = 1 - labels[::8]
    return Examples(dev.inputs, labels)


def run(settings=None, socrates=None, timaeus=None, **more):
    arguments = {"train": points(12, low=0.0), "dev": noisy_dev(), "search_space": SPACE}
    arguments = {**arguments, "tau": TAU, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", module.ImbalanceWarning)
        return agora(
            socrates or Polynomial(), timaeus or Rule(wavy), settings=settings, **arguments
        )


def comparable(result):
    """Everything a run decides: also the augmented inputs, which records do not compare."""
    inputs = [input_key(example.input) for one in result.rounds for example in one.augmented]
    return result.best, result.rounds, inputs, input_key(result.best.model)


@pytest.mark.parametrize("replay", [0, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rounds_spaces_scores_and_cost(strategy, replay):
    socrates, timaeus = Polynomial(), Rule(wavy)
    dev, sets = noisy_dev(), len(SPACE)
    settings = AgoraSettings(prune=strategy, replay=replay)
    result = run(settings, socrates, timaeus)
    rounds = result.rounds
    assert len(rounds) <= sets * (replay + 1)
    assert [(one.number, one.replay) for one in rounds] == [
        (number, again)
        for number in range(len(rounds) // (replay + 1))
        for again in range(replay + 1)
    ]
    assert rounds[0].space == tuple(range(sets))
    for one, following in zip(rounds, rounds[1:]):
        assert following.space == tuple(index for index in one.space if index not in one.pruned)
        assert (one.pruned == ()) == (one.replay < replay)
        assert one.best not in one.pruned
        assert following.best_score >= one.best_score
    assert rounds[-1].pruned == rounds[-1].space == (rounds[-1].best,)
    assert result.best.score == max(score for one in rounds for score in one.scores)
    predictions = socrates.predict(result.best.model, dev.inputs)
    assert module.accuracy(dev.labels, predictions) == result.best.score
    assert result.best.hparams == SPACE[result.best.index]
    chosen = next(
        one for one in rounds if (one.number, one.replay) == (result.best.round, result.best.replay)
    )
    assert chosen.scores[chosen.space.index(result.best.index)] == result.best.score
    # The paper's bounds: |Theta| fits and |E| labels per round, and once dev for the guard.
    assert len(socrates.seen) == sum(len(one.space) for one in rounds)
    assert len(socrates.seen) <= sets * (sets + 1) // 2 * (replay + 1)
    assert sum(map(len, timaeus.calls)) <= len(dev) * (1 + sets * (replay + 1))


@pytest.mark.parametrize("strategy", ["worst-only", "halving"])
def test_number_of_rounds(strategy):
    rounds = {"worst-only": 12, "halving": 5}[strategy]  # 12 sets; 12, 6, 3, 2, 1
    assert len(run(AgoraSettings(prune=strategy)).rounds) == rounds


def test_train_grows_only_by_labelled_images_of_the_best_fits_mistakes():
    socrates, dev = Polynomial(), noisy_dev()
    result = run(socrates=socrates)
    fits = iter(socrates.seen)
    expected = points(12, low=0.0)
    for one in result.rounds:
        models = {}
        for index in one.space:
            data = next(fits)
            assert np.array_equal(np.stack(data.inputs), np.stack(expected.inputs))
            assert np.array_equal(data.labels, expected.labels)
            models[index] = Polynomial().fit(data, SPACE[index])
        predictions = socrates.predict(models[one.best], dev.inputs)
        assert one.mistakes == tuple(np.flatnonzero(predictions != dev.labels))
        assert one.scores == tuple(
            np.mean(socrates.predict(models[index], dev.inputs) == dev.labels)
            for index in one.space
        )
        assert one.train_size == len(expected)
        assert one.label_counts == {
            str(label): count for label, count in collections.Counter(data.labels.tolist()).items()
        }
        expected_sources = [] if one is result.rounds[-1] else list(one.mistakes)
        assert [example.source for example in one.augmented] == expected_sources
        offsets = {tuple(example.input - dev.inputs[example.source]) for example in one.augmented}
        assert len(offsets) == len(one.augmented)
        for example in one.augmented:
            distance = np.linalg.norm(example.input - dev.inputs[example.source])
            assert TAU.lower <= distance <= TAU.upper
            assert example.label == wavy(example.input[None])[0]
            assert example.kept
        expected = expected.plus(one.augmented)
    assert next(fits, None) is None


def test_several_images_of_a_mistake_differ():
    first = run(AgoraSettings(images_per_mistake=3, max_rounds=2)).rounds[0]
    assert len({input_key(example.input) for example in first.augmented}) == 3 * len(first.mistakes)
    assert [example.source for example in first.augmented] == list(np.repeat(first.mistakes, 3))


def test_images_at_random_are_as_many_but_not_of_the_mistakes():
    first = run(AgoraSettings(images_from="random", max_rounds=2), Constant()).rounds[0]
    sources = [example.source for example in first.augmented]
    assert len(sources) == len(set(sources)) == len(first.mistakes) > 10
    assert set(sources) != set(first.mistakes)


def test_dev_and_test_never_enter_train():
    dev, test = noisy_dev(), points(40, seed=2)

    def tau(example, generator):  # every second result is a row that must not be used
        if generator.random() < 0.5:
            return TAU(example, generator)
        rows = generator.choice([dev, test]).inputs
        return rows[generator.integers(len(rows))]

    socrates = Polynomial()
    settings = AgoraSettings(image_attempts=60)
    result = run(settings, socrates, tau=tau, test_inputs=test.inputs)
    kept_out = {input_key(example) for example in [*dev.inputs, *test.inputs]}
    for data in socrates.seen:
        assert not kept_out & {input_key(example) for example in data.inputs}
    assert all(len(one.augmented) == len(one.mistakes) for one in result.rounds[:-1])
    assert result.rounds[-1].augmented == ()  # no set is left to be fitted on them


def test_test_inputs_that_can_be_walked_through_once_are_kept_out_too():
    test = points(3, seed=2).inputs
    result = run(tau=lambda example, generator: test[0], test_inputs=iter(test))
    assert all(one.augmented == () for one in result.rounds)


class Tensor:
    """As those of other libraries: without equality by value."""

    def __init__(self, values):
        self.values = np.array(values)


class MXNetArray(Tensor):
    def asnumpy(self):
        return self.values


class OtherArray(Tensor):
    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize("kind", [MXNetArray, OtherArray])
def test_a_dev_row_in_train_is_found_among_arrays_of_other_libraries(kind):
    train, dev = ([kind(row) for row in rows] for rows in ([[1.0, 2], [3, 4]], [[3.0, 4]]))
    with pytest.raises(module.DevInTrainError, match="row 1 of train is row 0 of dev"):
        run(train=Examples(train, np.array([0, 1])), dev=Examples(dev, np.array([1])))


def test_an_empty_store_with_a_length_is_used():
    class Sized(Store):
        def __len__(self):
            return len(self.records)

    store = Sized()
    run(AgoraSettings(max_rounds=1), store=store)
    assert len(store) == 1 + len(SPACE)


def test_numbers_of_numpy_resume_the_run_of_equal_ones():
    store = Store()
    settings = AgoraSettings(max_rounds=1)
    first = run(settings, store=store, seed=3)
    space = [{name: np.array(value)[()] for name, value in hparams.items()} for hparams in SPACE]
    again = run(settings, store=store, seed=np.int64(3), search_space=space)
    assert again.rounds == first.rounds


def test_a_tau_that_changes_nothing_makes_no_image():
    result = run(tau=lambda example, generator: example)
    assert all(one.augmented == () and one.train_size == 12 for one in result.rounds)


def test_a_tau_that_works_in_place_leaves_dev_alone():
    dev = noisy_dev()
    before = np.array(dev.inputs)

    def tau(example, generator):
        example += generator.uniform(0.1, 0.2)
        return example

    assert run(dev=dev, tau=tau).rounds[0].augmented
    assert np.array_equal(dev.inputs, before)


def test_images_of_one_round_do_not_repeat():
    def tau(example, generator):
        return np.array([2.0, generator.integers(3)])

    result = run(AgoraSettings(max_rounds=3, image_attempts=50), tau=tau)
    assert [len(one.augmented) for one in result.rounds] == [3, 0, 0]


@pytest.mark.parametrize(
    "settings", [AgoraSettings(), AgoraSettings(images_from="random"), AgoraSettings(balance=0.0)]
)
def test_one_seed_one_run(settings):
    np.random.seed(1)  # noqa: NPY002  the global generator must not matter
    one = comparable(run(settings, seed=7))
    np.random.seed(2)  # noqa: NPY002
    assert comparable(run(settings, seed=7)) == one
    assert comparable(run(settings, seed=8)) != one


def test_replay_fits_the_same_space_on_more_data():
    first, again = run(AgoraSettings(replay=1)).rounds[:2]
    assert again.space == first.space
    assert again.train_size == first.train_size + len(first.augmented)


def test_a_warm_start_begins_from_the_best_so_far():
    socrates = Polynomial()
    result = run(AgoraSettings(warm_start=True, max_rounds=2), socrates)
    sets, first = len(SPACE), result.rounds[0]
    assert socrates.starts[:sets] == [None] * sets
    data = points(12, low=0.0)
    best = Polynomial().fit(data, SPACE[first.best])
    for start in socrates.starts[sets:]:
        assert np.array_equal(start[1], best[1])
    run(AgoraSettings(max_rounds=2), cold := Polynomial())
    assert set(cold.starts) == {None}


def test_a_cold_start_needs_no_start_argument():
    class Plain:
        fit = staticmethod(lambda dataset, hparams: hparams["degree"])
        predict = staticmethod(lambda model, inputs: np.full(len(inputs), model % 2))

    assert run(socrates=Plain()).best.model in (1, 2, 3)


def test_fewer_rounds_than_a_run_has_need_their_best_model(tmp_path):
    one = AgoraSettings(max_rounds=1)
    for store in (lambda: Mortal(tmp_path), functools.partial(lambda kept: kept, Store())):
        everything = run(seed=3, store=store())
        assert everything.best.round == 2
        seen = []
        with pytest.raises(UserError, match=r"max_rounds 1: the run has 7 rounds.* at least 7"):
            run(one, seed=3, store=store(), on_round=seen.append)
        assert not seen
        assert run(AgoraSettings(max_rounds=3), seed=3, store=store()).best == everything.best


def test_max_rounds_counts_rounds_not_replays():
    assert len(run(AgoraSettings(max_rounds=2, replay=1)).rounds) == 4


def test_the_last_of_max_rounds_has_nothing_labelled():
    settings, timaeus = AgoraSettings(max_rounds=2, replay=1), Rule(wavy)
    rounds = run(settings, timaeus=timaeus).rounds
    assert all(one.mistakes for one in rounds)
    assert [bool(one.augmented) for one in rounds] == [True, True, True, False]
    assert len(timaeus.calls) == 1 + 3  # dev first


def test_it_ends_when_no_mistake_remains():
    dev = points(40, seed=1)

    class Knows(Polynomial):
        def predict(self, model, inputs):
            return quadrants(np.stack(inputs))

    result = run(socrates=Knows(), dev=dev)
    assert len(result.rounds) == 1
    assert result.rounds[0].mistakes == result.rounds[0].augmented == result.rounds[0].pruned == ()


def test_of_equal_scores_the_later_round_and_the_earlier_set_win():
    result = run(AgoraSettings(prune="worst-only"), socrates=Constant())
    assert result.best.round == len(result.rounds) - 1
    assert {one.best for one in result.rounds} == {result.best.index} == {0}
    assert result.rounds[0].pruned == (len(SPACE) - 1,)


def test_a_fit_that_diverged_is_the_worst():
    class Diverges(Regressor):
        def predict(self, model, inputs):
            values = super().predict(model, inputs)
            return values * (np.nan if model[0].max() > 2 else 1)

    result = run(socrates=Diverges(), objective=module.regression([0.5]))
    first = result.rounds[0]
    diverged = [place for place, score in zip(first.space, first.scores) if score == -np.inf]
    assert diverged
    assert result.best.index not in diverged
    assert first.pruned[0] in diverged
    assert json.dumps(first.as_dict(), allow_nan=False).count("null") == len(diverged)


def test_many_classes():
    def rule(x):
        return (x[:, 0] > -0.3).astype(int) + (x[:, 0] > 0.4) * 1

    dev = points(60, rule, seed=1)
    result = run(
        socrates=Polynomial((0, 1, 2)),
        timaeus=Rule(rule),
        train=points(6, rule, low=0.0),
        dev=dev,
    )
    assert {label for one in result.rounds for label in one.label_counts} == {"0", "1", "2"}
    assert result.best.score > result.rounds[0].scores[result.rounds[0].best]


def test_labels_may_be_words():
    class Words(Polynomial):
        def fit(self, dataset, hparams, start=None):
            labels = np.array([["no", "yes"].index(label) for label in dataset.labels])
            return super().fit(Examples(dataset.inputs, labels), hparams)

        def predict(self, model, inputs):
            return np.array(["no", "yes"])[super().predict(model, inputs)]

    def rule(x):
        return np.array(["no", "yes"])[wavy(x)]

    train, dev = points(12, rule, low=0.0), points(40, rule, seed=1)
    result = run(socrates=Words(), timaeus=Rule(rule), train=train, dev=dev)
    assert result.best.score > 0.5


def test_regression_counts_other_bins_as_mistakes_and_takes_timaeus_value():
    def rule(x):
        return x[:, 0] * x[:, 1] * 2

    dev = points(40, rule, seed=1)
    objective = module.regression([-0.5, 0.5])
    socrates = Regressor()
    result = run(
        socrates=socrates,
        timaeus=Rule(rule),
        train=points(12, rule, low=0.0),
        dev=dev,
        objective=objective,
    )
    first = result.rounds[0]
    predictions = Regressor().predict(
        Regressor().fit(points(12, rule, low=0.0), SPACE[first.best]), dev.inputs
    )

    def bins(values):
        return [int(value >= -0.5) + int(value >= 0.5) for value in values]

    wrong = [index for index in range(40) if bins(predictions)[index] != bins(dev.labels)[index]]
    assert list(first.mistakes) == wrong
    assert [example.label for example in first.augmented] == [
        rule(example.input[None])[0] for example in first.augmented
    ]
    assert max(first.scores) == pytest.approx(-np.mean((predictions - dev.labels) ** 2))


# Resumption


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


class Mortal(DiskStore):
    """A store of `Polynomial` models that dies after so many writing calls, or in the last one."""

    def __init__(self, folder, calls=10**9):
        super().__init__(str(folder), self.write, self.read)
        self.calls = calls

    @staticmethod
    def write(path, model):
        os.makedirs(path)  # a model may be a folder
        with open(os.path.join(path, "model.npz"), "wb") as handle:
            np.savez(handle, powers=model[0], weights=model[1])

    @staticmethod
    def read(path):
        with np.load(os.path.join(path, "model.npz")) as arrays:
            return arrays["powers"], arrays["weights"]

    def spend(self):
        self.calls -= 1
        if self.calls < 0:
            raise Killed

    def record(self, name, content):
        self.spend()
        super().record(name, content)

    def save_model(self, name, model):
        if not self.calls:  # dies while writing
            os.makedirs(temporary_name(os.path.join(self.folder, name)))
        self.spend()
        super().save_model(name, model)

    def drop_model(self, name):
        self.spend()
        super().drop_model(name)


class Threshold:
    """A candidate and a labeller whose labels are text; a model is a threshold."""

    def __init__(self, labeller=0.1):
        self.fits, self.labeller = 0, labeller

    def fit(self, dataset, hparams, start=None):
        self.fits += 1
        return hparams["threshold"]

    def predict(self, model, inputs):
        return np.where(np.array(inputs)[:, 0] > model, "yes", "no")

    def label(self, inputs):
        return self.predict(self.labeller, inputs)


def test_fits_whose_labels_are_text_are_recalled(tmp_path, capsys):
    points = np.random.default_rng(0).normal(size=(40, 2))
    labels = np.where(points[:, 0] > 0, "yes", "no")
    train, dev = (Examples(list(points[part]), labels[part]) for part in (slice(20), slice(20, 40)))
    space = [{"threshold": each} for each in (-0.5, 0.5, 0.3)]

    def resume():
        candidate = Threshold()
        path = str(tmp_path / "run")
        store = DiskStore(path, lambda path, model: Path(path).write_text(str(model)), str)
        result = agora(candidate, candidate, train, dev, space, Jitter(0.1, 0.2), store=store)
        return comparable(result)[1], candidate.fits

    (expected, fits), (again, more) = resume(), resume()
    assert fits >= len(space)
    assert more == 0
    assert again == expected
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        AgoraSettings(prune="halving"),
        AgoraSettings(prune="halving", warm_start=True, replay=1, balance=0.1),
    ],
)
def test_a_run_killed_anywhere_resumes_to_the_same_result(tmp_path, settings):
    space = SPACE[::3]
    expected = comparable(run(settings, search_space=space))
    fits = sum(len(one.space) for one in expected[1])
    for calls in itertools.count():
        folder = tmp_path / str(calls)
        dying, resumed = Polynomial(), Polynomial()
        try:
            run(settings, dying, search_space=space, store=Mortal(folder, calls))
            break
        except Killed:
            pass
        with lock_folder(str(folder)):
            store = Mortal(folder)
        result = run(settings, resumed, search_space=space, store=store)
        assert comparable(result) == expected
        # The fit in flight may be made twice, no other.
        assert fits <= len(dying.seen) + len(resumed.seen) <= fits + 1
        assert len([name for name in os.listdir(store.folder) if "fit" in name]) <= 2
    assert calls > fits


def test_a_finished_run_keeps_one_model_and_recalls_everything(tmp_path):
    result = run(store=Mortal(tmp_path))
    assert len(os.listdir(tmp_path / "models")) == 1
    seen = []
    again = run(socrates=(socrates := Polynomial()), store=Mortal(tmp_path), on_round=seen.append)
    assert comparable(again) == comparable(result)
    assert socrates.seen == []
    assert seen == result.rounds


def test_more_rounds_continue_from_fewer():
    store = Store()
    run(AgoraSettings(max_rounds=2), store=store)
    assert comparable(run(store=store)) == comparable(run())


def test_a_line_cut_short_is_forgotten(tmp_path):
    expected = comparable(run(store=Mortal(tmp_path)))
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    assert comparable(run(socrates=(socrates := Polynomial()), store=Mortal(tmp_path))) == expected
    assert len(socrates.seen) == 1
    names = [json.loads(line)["name"] for line in journal.read_bytes().splitlines()]
    assert names == [json.loads(line)["name"] for line in whole.splitlines()]


DAMAGE = [b"{}", b"{", b"7", b"\xff", b"[" * 100_000, b'{"name": "fit-0000-0001", "content": {}}']


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_loses_only_its_own_fit(tmp_path, capsys, damage):
    expected = comparable(run(AgoraSettings(max_rounds=1), store=Mortal(tmp_path)))
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    lines[2] = damage
    journal.write_bytes(b"\n".join(lines) + b"\n")
    socrates = Polynomial()
    again = run(AgoraSettings(max_rounds=1), socrates=socrates, store=Mortal(tmp_path))
    assert comparable(again) == expected
    assert len(socrates.seen) == 1
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {journal}:3: damaged record, moved to {journal}.damaged (")
    assert (tmp_path / "journal.jsonl.damaged").read_bytes() == damage + b"\n"
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_a_damaged_fit_whose_warm_start_is_gone_is_named(tmp_path):
    settings = AgoraSettings(warm_start=True)
    run(settings, store=Mortal(tmp_path))
    (model,) = (tmp_path / "models").iterdir()
    shutil.rmtree(model)  # as a later best would replace it
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    at = next(at for at, line in enumerate(lines) if b'"fit-0001-' in line)
    lines[at] = b"{}"
    journal.write_bytes(b"\n".join(lines) + b"\n")
    gone = r"fit-0001-\d{4} has to be repeated, .* that it started from, fit-0000-\d{4}, is gone"
    with pytest.raises(UserError, match=gone):
        run(settings, store=Mortal(tmp_path))


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path):
    def write(path, model):
        Path(path).mkdir()
        (Path(path) / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device", path)

    store = DiskStore(str(tmp_path), write, str)
    with pytest.raises(OSError, match="No space left"):
        store.save_model("best", None)
    assert list((tmp_path / "models").iterdir()) == []


def test_predictions_of_the_wrong_number_are_recomputed(tmp_path):
    expected = comparable(run(AgoraSettings(max_rounds=1), store=Mortal(tmp_path)))
    journal = tmp_path / "journal.jsonl"
    lines = [record_of(line) for line in journal.read_bytes().splitlines()]
    del lines[2]["content"]["predictions"][0]
    journal.write_bytes(b"".join(map(line_of, lines)))
    again = run(AgoraSettings(max_rounds=1), store=Mortal(tmp_path))
    assert comparable(again) == expected


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"settings": AgoraSettings(prune="halving")}, "prune"),
        ({"search_space": SPACE[:-1]}, "search_space"),
        ({"dev": points(40, seed=5)}, "dev"),
        ({"train": points(12, seed=5, low=0.0)}, "train"),
        ({"tau": Jitter(0.2, 0.3)}, "tau or Timaeus"),
        ({"timaeus": Rule(quadrants)}, "tau or Timaeus"),
    ],
)
def test_the_store_of_another_run_is_refused(change, name):
    store = Store()
    run(store=store)
    with pytest.raises(module.OtherRunError, match=f"(another|:) {name}[: ]"):
        run(**change, store=store)


def test_fits_may_be_made_elsewhere_and_in_any_order():
    def elsewhere(function, tasks):
        for task in reversed(tasks):
            sent = pickle.loads(pickle.dumps((function, task)))
            yield pickle.loads(pickle.dumps(sent[0](sent[1])))

    store = Store()
    result = run(map_fits=elsewhere, store=store)
    assert comparable(result) == comparable(run())
    assert len(store.models) == 1


# Guards


def test_an_empty_space_is_refused():
    with pytest.raises(module.EmptySearchSpaceError, match="search space is empty"):
        run(search_space=[])


def test_empty_data_and_wrong_lengths_are_refused():
    with pytest.raises(UserError, match="train has 0 and dev 40 rows"):
        run(train=points(0))
    with pytest.raises(ValueError, match="2 inputs have 3 labels"):
        Examples([1, 2], np.zeros(3))
    with pytest.raises(ValueError, match=r"label returned shape \(1,\) for 40 inputs"):
        run(timaeus=Rule(lambda x: np.zeros(1)))
    wrong = Polynomial()
    wrong.predict = lambda model, inputs: np.zeros((len(inputs), 2))
    with pytest.raises(ValueError, match=r"predict returned shape \(40, 2\) for 40 inputs"):
        run(socrates=wrong)


def test_a_limit_of_a_setting_is_named():
    with pytest.raises(UserError, match="--max_rounds 0"):
        run(AgoraSettings(max_rounds=0))


def test_a_negative_seed_is_refused_before_any_fit():
    with pytest.raises(ValueError, match="seed -1: must not be negative"):
        run(socrates=None, seed=-1)


def test_a_dev_row_in_train_is_refused():
    train, dev = points(12, low=0.0), noisy_dev()
    inputs = [*train.inputs[:5], dev.inputs[17].astype(np.float64).tolist(), *train.inputs[6:]]
    with pytest.raises(module.DevInTrainError, match="row 5 of train is row 17 of dev"):
        run(train=Examples(inputs, train.labels))


def test_a_test_set_equal_to_dev_is_refused():
    with pytest.raises(module.TestEqualsDevError):
        run(test_inputs=noisy_dev().inputs[::-1])
    run(AgoraSettings(max_rounds=1), test_inputs=noisy_dev().inputs[1:])


def named_warnings(space=SPACE[:2], replay=0, **arguments):
    settings = AgoraSettings(max_rounds=1, replay=replay)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agora(Polynomial(), search_space=space, tau=TAU, settings=settings, **arguments)
    assert all(one.filename == __file__ for one in caught)
    return [(one.category, str(one.message)) for one in caught]


@pytest.mark.parametrize(("right", "warned"), [(40, True), (41, False)])
def test_a_timaeus_right_two_times_in_three_is_too_weak(right, warned):
    x = np.random.default_rng(0).uniform(-1, 1, (60, 2))
    labels = np.arange(60) % 2
    answers = np.where(np.arange(60) < right, labels, 1 - labels)

    def rule(inputs):
        known = {input_key(row): answer for row, answer in zip(x, answers)}
        return np.array([known.get(input_key(row), 0) for row in inputs])

    train = Examples(x[:2] + 5, np.array([0, 1]))
    caught = named_warnings(timaeus=Rule(rule), train=train, dev=Examples(x, labels))
    assert [category for category, _ in caught] == [module.WeakTimaeusWarning] * warned


def test_imbalance_is_named():
    dev = points(40, seed=1)
    x = dev.inputs + 5
    few = Examples(x, (np.arange(40) < 9).astype(int))
    caught = named_warnings(timaeus=Rule(quadrants), train=few, dev=dev)
    assert [category for category, _ in caught] == [module.ImbalanceWarning] * 2
    assert "class 1 has 0.45 times an equal share of train" in caught[1][1]
    fair = Examples(x, (np.arange(40) < 11).astype(int))
    assert named_warnings(timaeus=Rule(quadrants), train=fair, dev=dev) == []
    one = Examples(x, np.ones(40, int))
    caught = named_warnings(timaeus=Rule(quadrants), train=one, dev=dev)
    assert "class 0 has 0.00 times" in caught[0][1]


def test_bins_are_named_by_their_bounds():
    few = Examples(points(40, seed=3).inputs, np.full(40, 0.25))
    dev = Examples(points(40, seed=1).inputs, np.linspace(0, 4, 40))
    bins = module.regression([1, 2.5])
    caught = named_warnings(timaeus=Rule(lambda x: x[:, 0]), train=few, dev=dev, objective=bins)
    assert "class 1 to 2.5 has 0.00 times an equal share of train" in caught[2][1]
    assert "class 2.5 to inf has 0.00 times" in caught[3][1]


@pytest.mark.parametrize(("replay", "warned"), [(0, True), (1, False)])
def test_a_space_of_one_set_adds_no_examples(replay, warned):
    data = {"timaeus": Rule(quadrants), "train": points(20, seed=3), "dev": points(40, seed=1)}
    caught = named_warnings(SPACE[:1], replay, **data)
    assert [category for category, _ in caught] == [module.SingleSetWarning] * warned
    if warned:
        assert "one set, which the first round drops: no examples are added" in caught[0][1]


# Pieces


def test_longest_common_subsequence_against_enumeration():
    generator = np.random.default_rng(0)
    for _ in range(100):
        first, second = (generator.integers(0, 4, generator.integers(0, 7)).tolist() for _ in "ab")
        found = longest_common_subsequence(first, second)
        subsequences = [
            {c for size in range(8) for c in itertools.combinations(one, size)}
            for one in (first, second)
        ]
        common = subsequences[0] & subsequences[1]
        assert tuple(found) in common
        assert len(found) == max(map(len, common))


def test_lcs_drops_those_that_share_the_longest_part_with_the_worst():
    space = [
        {"rate": 1, "decay": 1, "batch": 8, "seed": 0},  # the worst
        {"rate": 2, "decay": 2, "batch": 8, "seed": 0},  # shares the batch size only
        {"rate": 2, "decay": 1, "batch": 8, "seed": 1},  # shares decay and batch size: the longest
        {"rate": 1, "decay": 1, "batch": 4, "seed": 0},  # as long, but another part, and better
        {"rate": 3, "decay": 1, "batch": 8, "seed": 2},  # holds the same part
        {"rate": 4, "decay": 1, "batch": 8, "seed": 0},  # holds it too, and is the best
    ]
    assert module.sets_to_drop(range(6), space, "lcs") == [0, 2, 4]
    assert module.sets_to_drop([5, 1, 2, 3, 4, 0], space, "lcs") == [5, 2, 4]


def test_lcs_ignores_what_the_whole_space_shares():
    space = [{"rate": rate, "epochs": 5, "batch": 8} for rate in range(4)]
    assert module.sets_to_drop(range(4), space, "lcs") == [0]
    assert module.sets_to_drop([0], space[:1], "lcs") == [0]
    space.append({"rate": 0, "epochs": 6, "batch": 8})  # now epochs are searched, too
    assert module.sets_to_drop(range(4), space, "lcs") == [0, 1, 2]


def test_a_run_that_an_earlier_version_began_is_pruned_as_it_began():
    space = combinations({"degree": [1, 2, 3], "decay": [1e-3], "seed": [0]})
    store, earlier = Store(), Store()
    assert len(run(search_space=space, store=store).rounds[0].pruned) == 1
    begun = {name: value for name, value in store.recall("run").items() if name != "constants"}
    earlier.record("run", begun)
    first = run(search_space=space, store=earlier)
    assert len(first.rounds[0].pruned) == 2, "the constant decay counts as common"
    assert comparable(run(search_space=space, store=earlier)) == comparable(first)


def test_lcs_compares_names_with_values_and_not_seeds():
    space = [{"rate": 8, "seed": 3}, {"batch": 8, "seed": 3}, {"rate": 1, "seed": 3}]
    assert module.sets_to_drop([0, 1, 2], space, "lcs") == [0]
    copies = [*space, {"rate": 8, "seed": 4}, {"rate": 2, "seed": 0}]
    assert module.sets_to_drop([0, 1, 2, 3, 4], copies, "lcs") == [0, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_least_one_set_goes_and_the_best_only_when_alone(strategy):
    generator = np.random.default_rng(0)
    for size in range(1, len(SPACE) + 1):
        order = generator.permutation(len(SPACE))[:size].tolist()
        gone = module.sets_to_drop(order, SPACE, strategy)
        assert order[0] in gone
        assert set(gone) <= set(order)
        assert (order[-1] in gone) == (size == 1)
        if strategy == "halving":
            assert gone == order[: max(1, size // 2)]


def test_balance_keeps_as_many_as_the_limit_allows():
    generator = np.random.default_rng(0)
    for _ in range(60):
        have, more = generator.integers(0, 7, (2, 3))
        tolerance = generator.choice([0.0, 0.05, 0.2, 1.0])
        present, new = np.repeat([0, 1, 2], have), generator.permutation(np.repeat([0, 1, 2], more))
        keep = module.within_balance(present, new, [0, 1, 2], tolerance, generator)
        found = np.bincount(new[keep], minlength=3)
        allowed = [
            counts
            for counts in itertools.product(*(range(count + 1) for count in more))
            if all(
                not gain
                or have[one] + gain <= (1 / 3 + tolerance) * (have.sum() + sum(counts)) + 1e-6
                for one, gain in enumerate(counts)
            )
        ]
        assert tuple(found) == max(allowed, key=sum)


def test_balance_in_a_run_leaves_images_out_of_train():
    lopsided = Examples(points(12, low=0.0).inputs, np.ones(12, int))
    rounds = run(AgoraSettings(balance=0.0), train=lopsided).rounds
    dropped = [example for one in rounds for example in one.augmented if not example.kept]
    assert dropped
    for one, following in zip(rounds, rounds[1:]):
        kept = [example for example in one.augmented if example.kept]
        assert following.train_size == one.train_size + len(kept)
        assert one.as_dict()["images"] == {"made": len(one.augmented), "kept": len(kept)}
        gained = {str(example.label) for example in kept}
        for label in gained:
            assert following.label_counts[label] <= following.train_size / 2


def test_jitter_stays_within_its_bounds_and_goes_everywhere():
    generator = np.random.default_rng(0)
    steps = np.array([Jitter(0.5, 2.0)(np.ones(3), generator) - 1 for _ in range(2000)])
    lengths = np.linalg.norm(steps, axis=1)
    assert 0.5 <= lengths.min() < 0.52
    assert 1.98 < lengths.max() <= 2.0
    assert np.abs(steps.mean(0)).max() < 0.1
    assert np.allclose(np.cov(steps.T), np.eye(3) * (lengths**2).mean() / 3, atol=0.1)


def test_keys_of_equal_inputs_are_equal():
    assert input_key(np.array([[1.0, 2.0]], np.float32)) == input_key([(1, 2)])
    assert input_key({"b": [1], "a": "x"}) == input_key({"a": "x", "b": np.array([1])})
    assert input_key(("one", "two")) != input_key(("one", "three"))


def test_the_grid_of_the_authors_has_480_sets():
    space = combinations(
        {
            "seed": range(5),
            "learning_rate": [1e-4, 1e-5, 9e-6],
            "weight_decay": [0, 10, 100, 350],
            "warmup_ratio": [0.35, 0.4, 0.45, 0.5],
            "batch_size": [8, 16],
        }
    )
    assert len(space) == len({tuple(hparams.values()) for hparams in space}) == 480
    gone = module.sets_to_drop(range(480), space, "lcs")
    assert len(gone) == 5  # the worst set with every seed
    assert len({tuple(space[index].values())[1:] for index in gone}) == 1


def test_records_are_json():
    for one in run().rounds:
        record = json.loads(json.dumps(one.as_dict(), allow_nan=False))
        names = {field.name for field in dataclasses.fields(one)}
        assert set(record) == names - {"augmented"} | {"images"}  # the key on disk


def test_it_needs_neither_mxnet_nor_scikit_learn():
    code = (
        "import sys, bort.agora; sys.exit(bool({'mxnet', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What it is for; scripts/agora_toys.py shows the same with networks


def test_over_30_seeds_it_beats_the_best_of_the_grid_on_hidden_data():
    gains = []
    for seed in range(30):
        test = points(1000, seed=900 + seed)
        arguments = {
            "train": points(12, seed=300 + seed, low=0.0),
            "dev": points(60, seed=600 + seed),
            "seed": seed,
        }
        enumerated = Store()
        scores = []
        for settings in (AgoraSettings(max_rounds=1), AgoraSettings()):
            model = run(settings, store=enumerated, **arguments).best.model
            predictions = Polynomial().predict(model, test.inputs)
            scores.append(module.accuracy(test.labels, predictions))
        gains.append(scores[1] - scores[0])
    half = 2.045 * np.std(gains, ddof=1) / np.sqrt(30)  # Student's t, 29 degrees of freedom
    assert np.mean(gains) - half > 0
