"""GLUE's and SuperGLUE's averages: the published tables come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.tasks import get_task
from scripts import report_runs, score

# Published test scores: README of the original.
GLUE = {
    "CoLA": [63.9], "SST-2": [96.2], "MRPC": [92.3, 94.1], "STS-B": [89.2, 88.3],
    "QQP": [85.9, 66.0], "QNLI": [92.3], "RTE": [82.7], "WNLI": [71.2], "AX": [51.9],
}  # fmt: skip
MNLI = {"dev_matched": [88.1], "dev_mismatched": [87.8]}
SUPER_GLUE = {
    "BoolQ": [83.7], "CB": [86.5, 81.9], "COPA": [89.6], "MultiRC": [83.7, 54.1],
    "ReCoRD": [49.8, 49.0], "SuperGLUERTE": [81.2], "WiC": [70.1], "WSC": [65.8], "AX-b": [48.0],
}  # fmt: skip


def write_run(folder: Path, name: str, splits: dict[str, list[float]]) -> None:
    names = get_task(name).headline
    answers = {
        split: {"rows": 5, "metrics": {metric: value / 100 for metric, value in zip(names, values)}}
        for split, values in splits.items()
    }
    folder.mkdir(parents=True)
    content = {"task": name, "answers": {**answers, "test": {"rows": 5}}}
    (folder / "metrics.json").write_text(json.dumps(content))


def test_published_averages(tmp_path):
    for name, values in {**GLUE, **SUPER_GLUE}.items():
        write_run(tmp_path / name, name, {"dev": values})
    write_run(tmp_path / "MNLI", "MNLI", MNLI)
    tables = score.main([str(tmp_path)])
    assert tables["glue"].average == pytest.approx(83.57, abs=0.005)
    assert tables["superglue"].average == pytest.approx(74.11, abs=0.005)
    assert "race" not in tables


def test_runs_of_a_task_are_averaged_first(tmp_path, capsys):
    for name, values in GLUE.items():
        write_run(tmp_path / "a" / name, name, {"dev": values})
    write_run(tmp_path / "a" / "MNLI", "MNLI", MNLI)
    for number, value in enumerate((60.9, 66.9)):
        write_run(tmp_path / f"seed{number}" / "CoLA", "CoLA", {"dev": [value]})
    tables = score.main([str(tmp_path / "a"), str(tmp_path / "seed0"), str(tmp_path / "seed1")])
    cola = tables["glue"].tasks[0]
    assert cola.runs == pytest.approx([63.9, 60.9, 66.9])
    assert cola.mean == pytest.approx(63.9)
    assert cola.spread == pytest.approx(3.0)
    assert tables["glue"].average == pytest.approx(83.57, abs=0.005)
    assert "CoLA              3   63.90    3.00   66.90" in capsys.readouterr().out


def test_a_run_under_two_spellings_of_its_path_counts_once(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "CoLA", "CoLA", {"dev": [63.9]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs")
    folders = ["runs", str(tmp_path), "runs/../link", "runs/CoLA"]
    assert score.main(folders)["glue"].tasks[0].runs == pytest.approx([63.9])


def test_no_average_of_half_a_benchmark(tmp_path, capsys):
    write_run(tmp_path / "CoLA", "CoLA", {"dev": [60.0]})
    write_run(tmp_path / "RACE-H", "RACE-H", {"dev": [70.0]})
    tables = score.main([str(tmp_path)])
    assert tables["glue"].average is None
    assert tables["glue"].missing[:2] == ["SST-2", "MRPC"]
    assert "AX" not in tables["glue"].missing
    assert tables["race"].missing == []
    assert "average: none, no run of SST-2, MRPC" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", '{"task": "CoLA"}', '{"task": 3, "answers": {}}'])
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(SystemExit):
        score.main([str(tmp_path)])


def test_no_run_is_a_user_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        score.main([str(tmp_path)])
    assert "no metrics.json found" in capsys.readouterr().err


@pytest.mark.parametrize("program", [score, report_runs])
def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys, program):
    write_run(tmp_path / "CoLA", "CoLA", {"dev": [63.9]})
    for wrong in (tmp_path / "absent", tmp_path / "CoLA" / "metrics.json"):
        with pytest.raises(SystemExit):
            program.main([str(tmp_path), str(wrong)])
        assert f"error: {wrong}: is not a folder" in capsys.readouterr().err
