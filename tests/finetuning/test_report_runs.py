"""The report of fine-tuning runs, and their scores, from what a run really leaves."""

from __future__ import annotations

import json
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
    splits = ("dev_matched", "dev_mismatched")
    dev = {split: metrics["answers"][split]["metrics"]["accuracy"] for split in splits}
    assert own.dev == "; ".join(f"{split}: accuracy {one:.3f}" for split, one in dev.items())
    assert [part.split(":")[0] for part in own.baseline.split("; ")] == list(splits)
    assert own.submission == "MNLI-m.tsv: 2 valid, MNLI-mm.tsv: 3 valid"
    assert (own.run, predicted.run) == (str(runs / "MNLI"), str(runs / "AX"))
    assert predicted.task == "AX"
    assert predicted.submission == "AX.tsv: 4 valid"
    assert predicted.dev.startswith("matthews ")
    assert capsys.readouterr().out.splitlines()[2] == f"| {' | '.join(own)} |"


def test_an_invalid_submission_is_refused(runs):
    path = runs / "MNLI" / "MNLI-m.tsv"
    path.write_text(path.read_text().replace("entailment", "perhaps").replace("neutral", "perhaps")
                    .replace("contradiction", "perhaps"))  # fmt: skip
    (runs / "MNLI/SHA256SUMS").unlink()  # as the message about a changed file asks for
    own = report_runs.main([str(runs)])[0].submission
    assert own.startswith("REFUSED: ")
    assert "MNLI-m.tsv:2: label 'perhaps'" in own
    assert own.endswith("MNLI-mm.tsv: 3 valid")


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
    assert "average: none, no run of CoLA" in capsys.readouterr().out


def test_missing_test_set_is_named_and_the_others_are_reported(runs, tmp_path):
    shutil.copytree(TEST_DATA / "glue", tmp_path / "data")
    (tmp_path / "data" / "MNLI" / "test_matched.tsv").unlink()
    path = str(runs / "MNLI" / "config.json")
    config = read_json(path)
    config["TaskSettings"]["data_dir"] = str(tmp_path / "data")
    write_json(path, config)
    own, predicted = report_runs.main([str(runs)])
    assert own.submission == (
        f"MNLI-m.tsv: NOT CHECKED, no test_matched set in {tmp_path}/data, MNLI-mm.tsv: 3 valid"
    )
    assert predicted.submission == "AX.tsv: 4 valid"


def test_run_of_agora_is_reported_too(runs, capsys):
    metrics = read_json(str(runs / "MNLI" / "metrics.json"))
    folder = runs / "agora" / "MNLI"
    folder.mkdir(parents=True)
    content = {name: metrics[name] for name in ("task", "model", "answers")}
    write_json(str(folder / "metrics.json"), {**content, "selected_on": "dev_matched"})
    reports = report_runs.main([str(runs)])
    assert [each.task for each in reports] == ["MNLI", "AX", "MNLI", "AX"]
    agora = next(each for each in reports if each.task == "MNLI" and each.seconds == "-")
    assert (agora.train_examples, agora.steps, agora.baseline) == ("-", "-", "-")
    assert agora.rows.startswith("dev_matched 3 (of 9,815), dev_mismatched 3")
    assert agora.dev == next(each for each in reports if each.seconds != "-").dev


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "Squad"}, "task Squad: unknown"),
        ({"seconds": "long"}, "Expected"),
        ({"steps": float("nan")}, "is not JSON"),
        ({"answers": {"dev_matched": {"rows": 3, "metrics": {"f1": 1.0}}}}, "no metric 'accuracy'"),
    ],
)
def test_broken_metrics_are_named_after_the_others(runs, capsys, change, message):
    other = runs / "other" / "MNLI"
    other.mkdir(parents=True)
    content = {**read_json(str(runs / "MNLI" / "metrics.json")), **change}
    (other / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as caught:
        report_runs.main([str(runs)])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 4
    assert captured.err.startswith(f"error: {other / 'metrics.json'}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    with pytest.raises(SystemExit):
        score.main([str(runs)])


def test_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report_runs.main([str(tmp_path)])
    assert "no metrics.json found" in capsys.readouterr().err
