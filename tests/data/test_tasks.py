"""Every task of the table: names, files, casts, metrics and submissions on the tiny data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from bort.types import TaskKind
from data.submission import check_submission, write_submission
from data.task import Example, Task, default_data_dir, is_labelled
from data.tasks import get_task, task_names
from scripts import download_data, tasks

TEST_DATA = Path(__file__).resolve().parents[2] / "test_data"
NAMES = task_names()
WITH_LEADERBOARD = [*task_names("glue"), *task_names("superglue")]


def splits_of(task: Task) -> list[str]:
    return [*([task.train] if task.train else []), *task.dev, *task.test]


def right_scores(task: Task, examples: list[Example]) -> np.ndarray:
    """Scores of a model that is always right: one-hot, or the labels themselves."""
    labels = [example.label for example in examples]
    return np.array(labels) if task.kind == "regression" else np.eye(len(task.labels))[labels]


def test_all_tasks_are_there():
    assert len(task_names("glue")) == 10
    assert len(task_names("superglue")) == 10
    assert task_names("race") == ["RACE-H", "RACE-M", "RACE"]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("SST", "SST-2"),
        ("sst2", "SST-2"),
        ("STSB", "STS-B"),
        ("SuperGLUERTE", "SuperGLUERTE"),
        ("RTE", "RTE"),
        ("AXb", "AX-b"),
        ("AXg", "AX-g"),
        ("ax", "AX"),
        ("RACEH", "RACE-H"),
        ("race_m", "RACE-M"),
        ("MNLI", "MNLI"),
    ],
)
def test_aliases(alias, name):
    assert get_task(alias).name == name


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match=r"task Squad: unknown.*CoLA.*RACE-M"):
        get_task("Squad")
    with pytest.raises(UserError) as found:
        get_task("x" * 5000)
    assert len(str(found.value)) < 500


@pytest.mark.parametrize("name", NAMES)
def test_reads_every_split_of_the_tiny_data(name):
    task = get_task(name)
    for split in splits_of(task):
        examples, skipped = task.read(TEST_DATA, split)
        assert skipped == []
        assert len({example.uid for example in examples}) == len(examples)
        if split == task.train or split in task.dev:
            assert is_labelled(examples)
        for example in examples:
            assert len(example.inputs) == {"COPA": 2}.get(name, 4 if "RACE" in name else 1)
            assert all(text == text.strip() and text for one in example.inputs for text in one)


@pytest.mark.parametrize("name", NAMES)
def test_right_scores_give_full_marks_and_wrong_ones_do_not(name):
    task = get_task(name)
    for split in task.dev or task.test:
        examples = task.read(TEST_DATA, split).examples
        scores = right_scores(task, examples)
        values = task.metrics(examples, scores)
        assert set(task.headline) <= set(values)
        assert task.early_stop in values
        assert values == pytest.approx(dict.fromkeys(values, 1.0))
        wrong = task.metrics(examples, -scores)
        assert task.score(wrong) < 0.75
        assert task.score(wrong) == pytest.approx(np.mean([wrong[m] for m in task.headline]))


@pytest.mark.parametrize("name", WITH_LEADERBOARD)
def test_submissions_of_the_tiny_data_validate(name, tmp_path):
    task = get_task(name)
    for split in task.test:
        examples = task.read(TEST_DATA, split).examples
        scores = np.random.default_rng(0).normal(size=(len(examples), max(1, len(task.labels))))
        path = write_submission(task, split, examples, scores, tmp_path)
        assert path.name == task.submission_file(split)
        assert check_submission(path, task, split, examples) == task.count_rows(examples)


def test_submission_names_are_the_official_ones():
    names = {get_task(n).submission_file(s) for n in WITH_LEADERBOARD for s in get_task(n).test}
    glue = ("CoLA", "SST-2", "MRPC", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "QQP", "RTE", "WNLI")
    super_glue = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC", "AX-b", "AX-g")
    wanted = {f"{name}.tsv" for name in (*glue, "AX")} | {f"{name}.jsonl" for name in super_glue}
    assert names == wanted
    assert get_task("RACE-H").submission_file("test") is None


def test_diagnostic_sets_share_the_labels_of_the_model_that_predicts_them():
    for name, model in (("AX", "MNLI"), ("AX-b", "SuperGLUERTE"), ("AX-g", "SuperGLUERTE")):
        task = get_task(name)
        assert task.model_task == model
        assert task.labels == get_task(model).labels
        assert task.train is None
        assert task.dev == ()


def test_heads():
    outputs = {name: get_task(name).num_outputs for name in ("CoLA", "STS-B", "MNLI", "COPA")}
    assert outputs == {"CoLA": 2, "STS-B": 1, "MNLI": 3, "COPA": 1}
    assert get_task("ReCoRD").num_outputs == 2
    assert get_task("RACE-H").num_outputs == 1
    assert get_task("RACE-H", race_cast="joined").num_outputs == 4


@pytest.mark.parametrize(
    ("name", "folder", "cached"),
    [
        ("CoLA", "glue/CoLA", "glue_cola"),
        ("MNLI", "glue/MNLI", "glue_mnli"),
        ("BoolQ", "superglue/BoolQ", "superglue_boolq"),
        ("AX-b", "superglue/AX-b", "superglue_ax_b"),
        ("RACE-H", "race/RACE", "race"),
    ],
)
def test_every_layout_is_found(name, folder, cached, tmp_path, monkeypatch):
    task = get_task(name)
    official = TEST_DATA / folder
    shutil.copytree(official, tmp_path / "home" / "datasets" / cached)
    monkeypatch.setenv("MXNET_HOME", str(tmp_path / "home"))
    split = task.test[0]
    wanted = task.read(TEST_DATA, split)
    for data_dir in (None, TEST_DATA / folder.split("/")[0], official, str(official)):
        assert task.read(data_dir, split) == wanted


def test_folder_of_the_archive_inside_the_folder_of_the_task_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    task = get_task("MultiRC")
    inner = tmp_path / "datasets" / "superglue_multirc" / "MultiRC"
    shutil.copytree(TEST_DATA / "superglue" / "MultiRC", inner)
    for data_dir in (None, tmp_path / "datasets", inner.parent, inner):
        assert task.find(data_dir, "train") == inner / "train.jsonl"


def test_missing_file_lists_every_path_that_was_searched(tmp_path):
    for name in ("MultiRC", "AX", "RACE-M"):
        task = get_task(name)
        with pytest.raises(UserError) as caught:
            task.read(tmp_path, "test")
        said = str(caught.value)
        assert str(tmp_path) in said
        for path in task.search_paths(tmp_path, "test"):
            folder = os.path.relpath(path.parent, tmp_path)
            assert folder == "." or f" {folder}," in said or f" {folder} for" in said
            assert path.name in said.rpartition(" for ")[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_message_of_a_missing_file_is_short_however_long_its_folder(name):
    task = get_task(name)
    for split in filter(None, (task.train, *task.dev, *task.test)):
        with pytest.raises(UserError) as caught:
            task.read("/" + "folder/" * 500, split)
        assert len(str(caught.value)) < 800


def test_kinds_are_plain_words_on_disk_and_in_messages():
    for kind in TaskKind:
        assert f"{kind}" == str(kind) == json.loads(json.dumps(kind)) == kind.value
    kinds = {get_task(name).kind for name in NAMES}
    assert kinds == {"classification", "regression", "multiple_choice", "candidates"}


def test_default_folder_is_below_the_home_of_the_user(monkeypatch):
    monkeypatch.delenv("MXNET_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_data_dir() == Path("/home/ada/.mxnet/datasets")


def test_the_home_of_an_unknown_user_is_named(capsys):
    says = "~nobody-here/glue: the home folder of ~nobody-here is unknown; give the whole path"
    with pytest.raises(UserError, match=says):
        get_task("CoLA").read("~nobody-here/glue", "train")
    given = ["--data_dir", "~nobody-here/glue"]
    for main, arguments in ((download_data.main, ["CoLA", *given]), (tasks.main, given)):
        with pytest.raises(SystemExit):
            main(arguments)
        assert says in capsys.readouterr().err


def test_the_two_rte_are_not_confused(tmp_path):
    shutil.copytree(TEST_DATA / "superglue" / "RTE", tmp_path / "RTE")
    assert get_task("RTE").find(tmp_path, "dev") is None
    assert get_task("SuperGLUERTE").find(tmp_path, "dev") == tmp_path / "RTE" / "val.jsonl"


def test_a_missing_file_is_reported_with_its_path_and_the_cure(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no test set; .*download_data\.py CoLA.*--data_dir; .*glue/CoLA, .* for test\.tsv",
    ):
        get_task("CoLA").read(tmp_path, "test")


def test_a_split_or_suite_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(UserError, match=r"MNLI: has no split 'dev', only train, dev_matched, "):
        get_task("MNLI").read(TEST_DATA, "dev")
    with pytest.raises(UserError, match="BoolQ: has no split 'validation', only train, dev, test"):
        get_task("BoolQ").official_rows("validation")
    with pytest.raises(UserError, match="suite 'GLUE': expected one of glue, superglue, race"):
        task_names("GLUE")


@pytest.mark.parametrize("name", ["SST-2", "AX-g", "MultiRC", "ReCoRD", "RACE"])
def test_metrics_refuse_missing_labels_and_another_number_of_logits(name):
    task = get_task(name)
    examples = task.read(TEST_DATA, (task.dev or task.test)[0]).examples
    scores = np.zeros((len(examples), 4 if name == "RACE" else 2))
    with pytest.raises(ValueError, match=f"{len(examples)} examples have 1 logits"):
        task.metrics(examples, scores[:1])
    with pytest.raises(ValueError, match="need examples with labels"):
        task.metrics([example._replace(label=None) for example in examples], scores)


def test_a_file_that_is_a_link_to_nothing_is_not_taken_for_absent(tmp_path):
    """Else a run would end without the predictions of its test set."""
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "test.tsv").symlink_to("missing")
    with pytest.raises(UserError, match=r"CoLA/test\.tsv: cannot be read \(No such file"):
        get_task("CoLA").read(tmp_path, "test")


@pytest.mark.parametrize("name", ["SST-2", "BoolQ"])
def test_split_without_rows_is_refused(name, tmp_path):
    task = get_task(name)
    source = task.find(TEST_DATA, "train")
    header = source.read_bytes().split(b"\n")[0] + b"\n" if name == "SST-2" else b"\n"
    (tmp_path / source.name).write_bytes(header)
    with pytest.raises(UserError, match="has no rows"):
        task.read(tmp_path, "train")


@pytest.mark.parametrize("name", NAMES)
def test_official_row_counts_where_the_full_data_are(name, shared):
    task = get_task(name)
    present = [split for split in splits_of(task) if task.find(shared / "data", split)]
    if not present or "RACE" in name:
        pytest.skip(f"{shared} has no full set of this task")
    for split in present:
        examples, skipped = task.read(shared / "data", split)
        assert task.count_rows(examples) == task.official_rows(split)
        assert skipped == []


@pytest.mark.parametrize("name", NAMES)
def test_real_samples_are_read(name, shared):
    task = get_task(name)
    root = shared / "data" / ("" if "RACE" in name else "samples")
    present = [split for split in splits_of(task) if task.find(root, split)]
    if not present:
        pytest.skip(f"{shared} has no sample of this task")
    for split in present:
        assert task.read(root, split).examples
