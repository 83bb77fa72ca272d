"""The original's class names: the documented interface, on the tiny data."""

from __future__ import annotations

from pathlib import Path

import pytest

from bort.errors import UserError
from data import classification
from data.tasks import get_task

TEST_DATA = Path(__file__).resolve().parents[2] / "test_data"
ORIGINAL = {
    "MRPCTask": "MRPC", "QQPTask": "QQP", "QNLITask": "QNLI", "RTETask": "RTE",
    "STSBTask": "STS-B", "CoLATask": "CoLA", "MNLITask": "MNLI", "WNLITask": "WNLI",
    "SSTTask": "SST-2", "SuperGLUERTETask": "SuperGLUERTE", "CBTask": "CB", "WSCTask": "WSC",
    "WiCTask": "WiC", "COPATask": "COPA", "MultiRCTask": "MultiRC", "BoolQTask": "BoolQ",
    "ReCoRDTask": "ReCoRD", "AXbTask": "AX-b", "AXgTask": "AX-g", "RACEHTask": "RACE-H",
    "RACEMTask": "RACE-M",
}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    """Make the tiny data those of GluonNLP's cache."""
    (tmp_path / "datasets").symlink_to(TEST_DATA)
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))


@pytest.mark.parametrize(("class_name", "name"), ORIGINAL.items())
def test_every_class_returns_segments_with_their_names(cache, class_name, name):
    task = getattr(classification, class_name)()
    own = get_task(name)
    segments = {"dev": task.dataset_dev, "val": task.dataset_val, "test": task.dataset_test}
    assert type(task).__name__ == class_name
    if own.train is None:
        with pytest.raises(UserError, match="has no segment train"):
            task.dataset_train()
        with pytest.raises(UserError, match="has no segment dev"):
            task.dataset_val()
        segments = {"test": task.dataset_test}
    else:
        assert task.dataset_train()[0] == "train"
        assert len(task.dataset_train()[1]) == len(own.read(TEST_DATA, "train").examples)
    for read in segments.values():
        found = read()
        pairs = found if isinstance(found, list) else [found]
        for segment, dataset in pairs:
            assert len(dataset) == len(own.read(TEST_DATA, segment).examples)
    assert isinstance(task.dataset_test(), list) == (name == "MNLI")


def test_the_example_of_the_documentation(cache):
    task = classification.BoolQTask()
    for segment in (task.dataset_train(), task.dataset_val(), task.dataset_test()):
        assert segment[1]
    passage, question, label = task.dataset_train()[1][0]
    assert question
    assert label in task.class_labels == ["false", "true"]
    assert len(passage) > len(question)


def test_items_and_labels(cache):
    score = classification.STSBTask().dataset_train()[1][0][-1]
    assert isinstance(score, float)
    assert classification.STSBTask().class_labels is None
    first, second, label = classification.COPATask().dataset_train()[1][0]
    assert (len(first), len(second)) == (2, 2)
    assert label in ("0", "1")
    assert len(classification.CoLATask().dataset_test()[1][0]) == 1
    assert (classification.SSTTask().is_pair, classification.QQPTask().is_pair) == (False, True)


def test_get_task_takes_names_and_aliases(cache):
    assert classification.get_task("SST").task.name == "SST-2"
    assert classification.get_task("AX").dataset_test()[0] == "test"
    with pytest.raises(UserError, match="unknown"):
        classification.get_task("Squad")


def test_missing_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"BoolQ: no train set.*superglue/BoolQ"):
        classification.BoolQTask().dataset_train()
