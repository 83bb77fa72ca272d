"""Agora on tasks of text: its view of every kind of task, its labellers, spaces and workers."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from bort.agora import algorithm as agora
from bort.agora import tau
from bort.agora import text as agora_text
from bort.agora.labellers import FileTimaeus, LabelsMissingError, ModelTimaeus
from bort.agora.report import Report
from bort.agora.text import TextSocrates
from bort.communicator import SingleProcess
from bort.errors import UserError
from bort.finetuning.config import (
    ClassifierSettings,
    FinetuningOptimizerSettings,
    FinetuningRunSettings,
)
from bort.finetuning.search_space import read_space
from bort.grids import combinations
from bort.jobs import Serial
from data.task import Example
from data.tasks import get_task
from tests.agora.helpers import RidgeTuner, reviews, rule
from tests.ranks import ThreadRanks

ROOT = Path(__file__).resolve().parents[2]
TEST_DATA = str(ROOT / "test_data")
SPACES = ROOT / "scripts" / "agora_spaces"
DEFAULTS = (FinetuningOptimizerSettings(), ClassifierSettings(), FinetuningRunSettings())
SERIAL = agora_text.fits_by(Serial())
SPACE = combinations({"decay": [1e-3, 1.0, 30.0], "seed": [0, 1]})
TASK = get_task("SST-2")
TRAIN, DEV, TEST = reviews(120)[:12], reviews(120)[12:62], reviews(120)[62:]


# The rows of a task


def write_task(folder, **splits):
    path = folder / "glue" / "SST-2"
    path.mkdir(parents=True)
    for split, rows in splits.items():
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_rows_of_train_that_dev_or_test_holds_are_left_out(tmp_path):
    train = [("one", 1), ("two", 0), ("three", 1), ("four", 0), ("five", 1)]
    folder = write_task(tmp_path, train=train, dev=[("two", 0)], test=[("five", 1), ("six", 0)])
    data = agora_text.read_text_data(TASK, folder)
    assert [one.inputs[0][0] for one in data.train] == ["one", "three", "four"]
    assert data.dropped == 2
    assert [one.label for one in data.test] == [1, 0]
    assert data.kept_out == [(("five",),), (("six",),)]
    assert len(agora_text.read_text_data(TASK, folder, train_rows=2).train) == 2


def test_a_test_set_without_labels_only_keeps_its_rows_out():
    data = agora_text.read_text_data(TASK, TEST_DATA)
    assert (data.test, len(data.kept_out)) == ([], 3)


@pytest.mark.parametrize("split", ["dev_mismatched", "test_mismatched"])
def test_the_second_dev_and_test_sets_are_kept_out_too(tmp_path, split):
    task, folder = get_task("MNLI"), tmp_path / "glue" / "MNLI"
    shutil.copytree(os.path.join(TEST_DATA, "glue", "MNLI"), folder)
    row = task.read(TEST_DATA, split).examples[0]
    lines = (folder / "train.tsv").read_text().splitlines()
    fields = lines[-1].split("\t")
    for name, text in zip(task.text_columns, row.inputs[0]):
        fields[lines[0].split("\t").index(name)] = text
    (folder / "train.tsv").write_text("\n".join([*lines, "\t".join(fields), ""]))
    data = agora_text.read_text_data(task, str(tmp_path))
    assert row.inputs in data.kept_out
    assert row.inputs not in [each.inputs for each in data.train]
    assert data.dropped == 1


def test_train_rows_of_record_are_queries():
    data = agora_text.read_text_data(get_task("ReCoRD"), TEST_DATA, train_rows=2)
    assert {row.uid[0] for row in data.train} == {0, 1}
    assert len(data.train) == 6


def test_a_labelled_test_set_that_shares_rows_with_dev_is_refused(tmp_path):
    folder = write_task(tmp_path, train=[("one", 1)], dev=[("two", 0)], test=[("two", 0)])
    with pytest.raises(UserError, match=r"test.tsv: 1 of its inputs are also in dev"):
        agora_text.read_text_data(TASK, folder)


def test_a_task_without_training_set_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"AX-b: has no training set; run SuperGLUERTE and"):
        agora_text.read_text_data(get_task("AX-b"), TEST_DATA)


KINDS = ["SST-2", "CoLA", "MRPC", "STS-B", "MNLI", "CB", "COPA", "MultiRC", "ReCoRD", "RACE-M"]


@pytest.mark.parametrize("name", KINDS)
def test_the_objective_is_the_leaderboards_figure_for_every_kind_of_task(name):
    """Random scores: what is computed from predictions is what the task computes from scores."""
    task = get_task(name)
    dev = task.read(TEST_DATA, task.dev[0]).examples
    width = len(dev[0].inputs) if task.kind == "multiple_choice" else max(1, task.num_outputs)
    data = agora_text.examples_of(dev)
    objective = agora_text.objective_of(task, dev, [0.5, 1.5, 2.5, 3.5, 4.5])
    for seed in range(5):
        scores = np.random.default_rng(seed).normal(2.5, 2, (len(dev), width))
        predictions = agora_text.predictions_of(task, scores)
        assert predictions.shape == (len(dev),)
        kept = np.asarray(json.loads(json.dumps(predictions.tolist())))  # as the journal keeps them
        expected = task.score(task.metrics(dev, scores))
        assert objective.score(data.labels, kept) == pytest.approx(expected)
        wrong = objective.classes(data.labels) != objective.classes(kept)
        if task.kind in ("classification", "multiple_choice"):
            assert wrong.tolist() == (scores.argmax(1) != data.labels).tolist()
        elif task.kind == "candidates":
            assert wrong.tolist() == ((scores[:, 1] > scores[:, 0]) != data.labels).tolist()
        else:
            values = (data.labels, np.clip(scores[:, 0], 0, 5))
            bins = [np.floor(each + 0.5) for each in values]
            assert wrong.tolist() == (bins[0] != bins[1]).tolist()
    assert agora_text.rows_of(data)[0] == dev[0]._replace(uid=0, candidate="", answers=())


@pytest.mark.parametrize("name", ["SST-2", "STS-B", "COPA", "ReCoRD"])
def test_scores_that_are_no_numbers_give_no_score(name):
    task = get_task(name)
    dev = task.read(TEST_DATA, task.dev[0]).examples
    scores = np.zeros((len(dev), 2))
    scores[0] = np.nan
    predictions = agora_text.predictions_of(task, scores)
    objective = agora_text.objective_of(task, dev, [2.5])
    assert np.isnan(objective.score(None, predictions))
    assert np.isnan(json.loads(json.dumps(predictions.tolist()))).all()


# Runs


def run(folder, settings=None, tuner=None, map_fits=SERIAL, **more):
    fits = Path(folder) / "fits"
    fits.mkdir(parents=True, exist_ok=True)
    tuner = tuner or RidgeTuner(DEV)
    dev = [row.inputs for row in DEV]
    arguments = {
        "search_space": SPACE,
        "tau": tau.make_tau(tau.TauSettings(tau="dropout,swap,noise"), None, TASK),
        "store": agora_text.open_store(str(folder)),
        "timaeus": ModelTimaeus(TASK, rule),
        **more,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", agora.ImbalanceWarning)
        return agora.agora(
            TextSocrates(tuner, TASK, dev, str(fits)),
            train=agora_text.examples_of(TRAIN),
            dev=agora_text.examples_of(DEV),
            settings=settings,
            objective=agora_text.objective_of(TASK, DEV, []),
            test_inputs=[row.inputs for row in TEST],
            map_fits=map_fits,
            **arguments,
        )


def comparable(result):
    inputs = [example.input for one in result.rounds for example in one.augmented]
    return result.best, result.rounds, inputs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def test_a_run_on_text(finished):
    folder, result = finished
    first, last = result.rounds[0], result.rounds[-1]
    assert result.best.score > max(first.scores)
    assert last.train_size > first.train_size
    kept_out = {row.inputs for row in [*DEV, *TEST]}
    for one in result.rounds:
        for example in one.augmented:
            assert example.input not in kept_out
            words, new_words = (
                each[0][0].split() for each in (DEV[example.source].inputs, example.input)
            )
            assert 1 <= tau.distance(words, new_words) <= 1  # 10 to 20 % of 8 words
            row = Example(0, example.input)
            assert example.label == int(rule([row])[0, 1] > 0)
    # The best model's predictions are those that were scored; nothing else is left of the fits.
    scores = RidgeTuner(DEV).score(result.best.model.folder, DEV)
    assert TASK.metrics(DEV, scores)["accuracy"] == result.best.score
    assert os.listdir(folder / "fits") == []
    assert len(os.listdir(folder / "models")) == 1


class DyingTuner(RidgeTuner):
    """Dies in a fit, after it has written something."""

    fits_left = 0

    def fit(self, rows, hparams, start, folder):
        if not DyingTuner.fits_left:
            (Path(folder) / "half").write_text("written")
            raise KeyboardInterrupt
        DyingTuner.fits_left -= 1
        return super().fit(rows, hparams, start, folder)


@pytest.mark.parametrize("fits", [0, 1, 5, 6, 8])
def test_a_killed_run_resumes_to_the_same_result(finished, tmp_path, fits):
    DyingTuner.fits_left = fits
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tuner=DyingTuner(DEV))
    assert comparable(run(tmp_path)) == comparable(finished[1])


def test_a_warm_start_gets_the_folder_of_the_best(tmp_path):
    starts = []

    class Watching(RidgeTuner):
        def fit(self, rows, hparams, start, folder):
            starts.append(start and os.path.basename(start))
            assert start is None or os.listdir(start) == ["model.npz"]
            return super().fit(rows, hparams, start, folder)

    settings = agora.AgoraSettings(warm_start=True, max_rounds=2)
    result = run(tmp_path, settings, Watching(DEV))
    first = result.rounds[0]
    assert starts[:6] == [None] * 6
    assert set(starts[6:]) == {agora.fit_name(0, first.best)}


# Workers


def test_processes_share_the_fits(finished, tmp_path):
    with agora_text.fits_on(2, SingleProcess()) as map_fits:
        result = run(tmp_path, agora.AgoraSettings(max_rounds=1), map_fits=map_fits)
    expected = run(tmp_path / "alone", agora.AgoraSettings(max_rounds=1))
    assert comparable(result) == comparable(expected)
    assert os.listdir(tmp_path / "fits") == []


class ExitingTuner(RidgeTuner):
    def fit(self, rows, hparams, start, folder):
        os._exit(3)


def test_a_worker_that_dies_is_reported_in_one_line(tmp_path):
    died = pytest.raises(UserError, match=r"--workers 2: a worker process ended with status 3; re")
    with died, agora_text.fits_on(2, SingleProcess()) as map_fits:
        run(tmp_path, tuner=ExitingTuner(DEV), map_fits=map_fits)


def test_ranks_share_the_fits(finished, tmp_path):
    with ThreadRanks(3) as ranks, agora_text.fits_on(1, ranks.rank(0)) as map_fits:
        result = run(tmp_path, map_fits=map_fits)
    assert ranks.finished()
    assert comparable(result) == comparable(finished[1])
    assert os.listdir(tmp_path / "fits") == []


def test_a_single_process_gathers_its_own_value():
    assert SingleProcess().allgather_object("one") == ["one"]


# Labellers


def test_a_models_labels():
    labels = ModelTimaeus(TASK, rule).label([row.inputs for row in DEV])
    assert labels.tolist() == [row.label for row in DEV]
    task = get_task("ReCoRD")
    scores = np.array([[0.0, 1.0], [1.0, 0.5], [0.0, 0.1]])
    labels = ModelTimaeus(task, lambda rows: scores).label([(("a", "b"),)] * 3)
    assert labels.tolist() == [1, 0, 1]
    values = ModelTimaeus(get_task("STS-B"), lambda rows: np.array([[2.5], [7.0]]))
    assert values.label([(("a", "b"),)] * 2).tolist() == [2.5, 5.0]


@pytest.mark.parametrize("name", ["SST-2", "ReCoRD", "STS-B"])
def test_a_model_whose_outputs_are_no_numbers_labels_nothing(name):
    task = get_task(name)
    scores = np.zeros((2, task.num_outputs))
    scores[1] = np.nan
    with pytest.raises(UserError, match="--timaeus: the model's outputs contain NaN or infinity"):
        ModelTimaeus(task, lambda rows: scores).label([(("a", "b"),)] * 2)


def test_labels_made_elsewhere(finished, tmp_path):
    """The run stops for the labels of dev and of each round, and gives the same result."""
    labels, wanted = tmp_path / "labels.jsonl", tmp_path / "to_label.jsonl"

    def resume():
        return run(tmp_path, timaeus=FileTimaeus(TASK, str(labels), str(wanted)))

    for _ in finished[1].rounds:
        with pytest.raises(
            LabelsMissingError, match=r"replace null in .* by \"0\" or \"1\", append its"
        ):
            resume()
        lines = [json.loads(line) for line in wanted.read_text().splitlines()]
        rows = [Example(0, tuple(map(tuple, line["inputs"]))) for line in lines]
        with open(labels, "a", encoding="utf-8") as handle:
            for line, scores in zip(lines, rule(rows)):
                handle.write(json.dumps({**line, "label": "01"[int(scores[1] > 0)]}) + "\n")
    # It stopped for dev, and for the augmented examples of each round but the last.
    assert comparable(resume()) == comparable(finished[1])
    assert not wanted.exists()


def test_an_input_that_dev_has_twice_is_labelled_once(tmp_path):
    labels, wanted = tmp_path / "labels.jsonl", tmp_path / "to_label.jsonl"
    inputs = [(("a",),), (("b",),), (("a",),)]
    with pytest.raises(LabelsMissingError, match="2 inputs have no label"):
        FileTimaeus(TASK, str(labels), str(wanted)).label(inputs)
    labels.write_text(wanted.read_text().replace("null", '"1"', 1).replace("null", '"0"', 1))
    found = FileTimaeus(TASK, str(labels), str(tmp_path / "none.jsonl")).label(inputs)
    assert found.tolist() == [1, 0, 1]


def test_labels_that_were_entered_in_the_file_of_missing_ones_are_kept(tmp_path):
    labels, wanted = tmp_path / "labels.jsonl", tmp_path / "to_label.jsonl"
    line = '{"inputs": [["a"]], "label": %s}\n'
    wanted.write_text(line % '"1"', encoding="utf-8")
    timaeus = FileTimaeus(TASK, str(labels), str(wanted))
    for inputs in ([(("a",),), (("b",),)], []):
        with pytest.raises(UserError, match=r"to_label.jsonl:1: has a label that .* lacks; append"):
            timaeus.label(inputs)
    assert wanted.read_text(encoding="utf-8") == line % '"1"'
    labels.write_bytes(wanted.read_bytes())
    with pytest.raises(LabelsMissingError, match="1 inputs have no label"):
        FileTimaeus(TASK, str(labels), str(wanted)).label([(("a",),), (("b",),)])
    with pytest.raises(UserError, match=r"to_label.jsonl: is replaced by the run"):
        FileTimaeus(TASK, str(tmp_path / "." / "to_label.jsonl"), str(wanted))


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("SST-2", "{", r'labels.jsonl:2: is not JSON .*; a line must be {"inputs"'),
        ("SST-2", '{"inputs": [["a"]]}', r"has no 'label'; a line must be {"),
        ("SST-2", '{"inputs": [["a"]], "label": "1", "label": "0"}', r"has a key twice in"),
        ("SST-2", '{"inputs": [["\\ud800"]], "label": "1"}', r"half of a surrogate pair"),
        ("STS-B", f'{{"inputs": [["a", "b"]], "label": {10**400}}}', r"is not from 0 to 5"),
        ("SST-2", '{"inputs": [["a"]], "label": 1}', r'label 1 is none of "0" or "1"'),
        ("CB", '{"inputs": [["a", "b"]], "label": null}', r'label None is none of "entail'),
        ("STS-B", '{"inputs": [["a", "b"]], "label": "4"}', r"label '4' is not a number"),
        ("STS-B", '{"inputs": [["a", "b"]], "label": NaN}', r"label nan is not from 0 to 5"),
        ("STS-B", '{"inputs": [["a", "b"]], "label": 99}', r"label 99 is not from 0 to 5"),
        ("STS-B", '{"inputs": [["a", "b"]], "label": -0.5}', r"label -0.5 is not from 0 to 5"),
        ("SST-2", '{"inputs": ["a"], "label": "1"}', r"labels.jsonl:2: inputs must be a list of l"),
        ("SST-2", '{"inputs": "a", "label": "1"}', r"'inputs' is 'a', expected a list"),
        ("SST-2", '{"inputs": [[1]], "label": "1"}', r"'text' is 1, expected text"),
        ("SST-2", "\udcff", r"labels.jsonl:2: is not UTF-8"),
    ],
)
def test_a_line_that_is_no_label_is_named(tmp_path, task, line, message):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n" + line + "\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        FileTimaeus(get_task(task), str(path), str(tmp_path / "to_label.jsonl"))


def test_two_labels_of_one_input_are_refused_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "labels.jsonl"
    line = '{"inputs": [["a"]], "label": "%s"}\n'
    path.write_text("\ufeff" + line % 1 + line % 1, encoding="utf-8")
    timaeus = FileTimaeus(TASK, str(path), str(tmp_path / "to_label.jsonl"))
    assert timaeus.label([(("a",),)]).tolist() == [1]
    path.write_text(line % 1 + line % 0)
    with pytest.raises(UserError, match=r"jsonl:2: another label than on line 1 for the same"):
        FileTimaeus(TASK, str(path), str(tmp_path / "to_label.jsonl"))


@pytest.mark.parametrize(
    ("task", "inputs", "line", "message"),
    [
        ("STS-B", (("a", "b"),), [["a b"]], "has 1 texts, an input of STS-B has 2"),
        ("COPA", (("p", "a"), ("p", "b")), [["p", "a", "b"]], r"has 3 texts, .* has 2 \+ 2"),
    ],
)
def test_a_label_of_inputs_that_no_example_can_have_is_named(tmp_path, task, inputs, line, message):
    path = tmp_path / "labels.jsonl"
    row = {"inputs": line, "label": 1.0 if task == "STS-B" else "1"}
    path.write_text("\n" + json.dumps(row), encoding="utf-8")
    timaeus = FileTimaeus(get_task(task), str(path), str(tmp_path / "to_label.jsonl"))
    with pytest.raises(UserError, match=f"jsonl:2: {message}"):
        timaeus.label([inputs])


# Search spaces


def test_the_smaller_spaces_take_their_values_from_it():
    published = read_space(str(SPACES / "published.yaml"), *DEFAULTS)
    sizes = {}
    for path in SPACES.glob("*_rows.yaml"):
        space = read_space(str(path), *DEFAULTS)
        sizes[path.stem] = len(space)
        for hparams in space:
            plain = {name: value for name, value in hparams.items() if name != "epochs"}
            assert plain in published
    assert sizes == {"hundreds_of_rows": 24, "thousands_of_rows": 12, "many_rows": 4}


# The report


def test_the_report_of_a_run(finished, tmp_path, capsys, figures):
    _, result = finished
    data = agora_text.TextData(TASK, TRAIN, DEV, TEST, [], 3)
    report = Report(str(tmp_path), data, SPACE, "a rule")
    for record in result.rounds:
        report.add(record)
    from bort.agora.report import ModelMetrics

    first, last = (
        ModelMetrics({"accuracy": 0.5}, {"accuracy": 0.25}),
        ModelMetrics({"accuracy": 1.0}, None),
    )
    report.finish(result.best, first, last)
    content = json.loads((tmp_path / "agora.json").read_text())
    assert content["rows"] == {"train": 12, "dev": 50, "test": len(TEST)}
    assert content["search_space"] == SPACE
    assert content["best_of_grid"] == {"dev": {"accuracy": 0.5}, "test": {"accuracy": 0.25}}
    assert content["best"]["theta"] == dict(result.best.hparams)
    assert len(content["rounds"]) == len(result.rounds)
    assert content["seconds"] == sum(record.seconds for record in result.rounds)
    for kept, record in zip(content["rounds"], result.rounds):
        assert kept["space"] == list(record.space)
        assert kept["scores"] == list(record.scores)
        assert kept["mistakes"] == list(record.mistakes)
        assert kept["images"]["made"] == len(record.augmented)
        assert kept["seconds"] == record.seconds > 0
        assert sum(kept["label_shares"].values()) == pytest.approx(1)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(result.rounds) + 2
    assert shown[0].startswith("round 0  sets 6  train 12  dev 0.")
    assert shown[-2:] == [
        "best of the grid  dev (selected on): accuracy 0.5000  test: accuracy 0.2500",
        "Agora             dev (selected on): accuracy 1.0000",
    ]
    lines = [line.split("\t") for line in (tmp_path / "images.tsv").read_text().splitlines()]
    images = [(one, example) for one in result.rounds for example in one.augmented]
    assert len(lines) == len(images) + 1
    for line, (one, example) in zip(lines[1:], images):
        row = DEV[example.source]
        assert line == [
            str(one.number), "0", str(example.source), "yes", str(example.label), str(row.label),
            example.input[0][0], row.inputs[0][0],
        ]  # fmt: skip
    assert (tmp_path / "agora.png").read_bytes().startswith(b"\x89PNG")
    scores, sizes = figures[-1].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in scores.lines}
    assert lines["best of the round"] == [max(one.scores) for one in result.rounds]
    assert lines["best so far"] == [one.best_score for one in result.rounds]
    last = {bars.get_label(): bars.patches[-1].get_height() for bars in sizes.containers}
    counts = result.rounds[-1].label_counts.items()
    assert last == {f"class {name}": count for name, count in counts}
