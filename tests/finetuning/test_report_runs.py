"""The report of fine-tuning runs, and their scores, from what a run really leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bort.files import read_json, write_json
from scripts import report_runs, score
from tests.finetuning.helpers import finetuned

TEST_DATA = Path(__file__).resolve().parents[2] / "test_data"


@pytest.fixture(scope="module")
def mnli(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    finetuned(TEST_DATA, folder, task_name="MNLI", epochs=1, train_rows=4)
    return folder


@pytest.fixture
def runs(mnli, tmp_path) -> Path:
    return Path(shutil.copytree(mnli, tmp_path / "runs"))


def test_report_of_a_run_and_of_the_set_that_it_predicts(runs, capsys):
    own, predicted = report_runs.main([str(runs)])
    metrics = read_json(str(runs / "MNLI" / "metrics.json"))
    assert own.rows == (
        "train 6 (of 392,702), dev_matched 3 (of 9,815), dev_mismatched 3 (of 9,832), "
        "test_matched 2 (of 9,796), test_mismatched 3 (of 9,847)"
    )
    assert (own.train_examples, own.steps) == ("4", str(metrics["steps"]))
    dev = [metrics["answers"][split]["metrics"]["accuracy"]
           for split in ("dev_matched", "dev_mismatched")]  # fmt: skip
    assert own.dev == "; ".join(f"accuracy {one:.3f}" for one in dev)
    assert own.baseline.count("accuracy") == 2
    assert own.submission == "MNLI-m.tsv: 2 good, MNLI-mm.tsv: 3 good"
    assert predicted.task == "AX"
    assert predicted.submission == "AX.tsv: 4 good"
    assert predicted.dev.startswith("matthews ")
    assert capsys.readouterr().out.splitlines()[2] == f"| {' | '.join(own)} |"


def test_a_spoilt_submission_is_refused(runs):
    path = runs / "MNLI" / "MNLI-m.tsv"
    path.write_text(path.read_text().replace("entailment", "perhaps").replace("neutral", "perhaps")
                    .replace("contradiction", "perhaps"))  # fmt: skip
    own = report_runs.main([str(runs)])[0].submission
    assert own.startswith("REFUSED: ")
    assert "MNLI-m.tsv:2: label 'perhaps'" in own
    assert own.endswith("MNLI-mm.tsv: 3 good")


def test_all_rows_of_the_official_set(runs):
    path = str(runs / "MNLI" / "metrics.json")
    metrics = read_json(path)
    metrics["rows"]["train"] = 392702
    write_json(path, metrics)
    assert report_runs.main([str(runs)])[0].rows.startswith("train 392,702, dev_matched 3 (of")


def test_scores_of_a_run_and_of_the_set_that_it_predicts(runs, capsys):
    metrics = read_json(str(runs / "MNLI" / "metrics.json"))
    tasks = {task.name: task.runs for task in score.main([str(runs)])["glue"].tasks}
    assert tasks.keys() == {"MNLI", "AX"}
    assert tasks["MNLI"] == pytest.approx([100 * metrics["best"]["score"]])
    assert tasks["AX"] == pytest.approx(
        [100 * metrics["answers"]["AX/test"]["metrics"]["matthews"]]
    )
    assert "average: not given, no run of CoLA" in capsys.readouterr().out


def test_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report_runs.main([str(tmp_path)])
    assert "no metrics.json there" in capsys.readouterr().err
