"""The list of tasks, and the check of their files."""

from __future__ import annotations

import shutil

import pytest

from data.tasks import task_names
from scripts import tasks
from tests.conftest import ROOT

TEST_DATA = str(ROOT / "test_data")


def test_every_task_is_listed_with_its_files(capsys):
    rows = tasks.main(["--data_dir", TEST_DATA])
    assert [row[0] for row in rows] == task_names()
    assert {row[-1] for row in rows} == {"all"}
    table = capsys.readouterr().out
    assert (
        "| MNLI | glue | classification | accuracy | train 392,702, dev_matched 9,815, "
        "dev_mismatched 9,832, test_matched 9,796, test_mismatched 9,847 | "
        f"{TEST_DATA}/glue/MNLI | all |"
    ) in table


def test_absent_files_are_shown_where_they_are_looked_for(tmp_path):
    shutil.copytree(ROOT / "test_data/glue/CoLA", tmp_path / "CoLA")
    (tmp_path / "CoLA" / "test.tsv").unlink()
    rows = {row[0]: row for row in tasks.main(["--data_dir", str(tmp_path)])}
    assert rows["CoLA"][-2:] == [str(tmp_path / "CoLA"), "train, dev"]
    assert rows["CB"][-2:] == [str(tmp_path / "superglue" / "CB"), "none"]


def test_check_reads_every_split(capsys, tmp_path):
    tasks.main(["--data_dir", TEST_DATA, "--check", "CoLA", "ReCoRD"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"CoLA train: {TEST_DATA}/glue/CoLA/train.tsv: ")
    assert lines[0].endswith("labelled")
    assert "no labels" in lines[2]


def test_check_names_what_is_missing_or_broken(capsys, tmp_path):
    shutil.copytree(ROOT / "test_data/glue/CoLA", tmp_path / "CoLA")
    (tmp_path / "CoLA" / "test.tsv").unlink()
    with open(tmp_path / "CoLA" / "dev.tsv", "a") as file:
        file.write("broken\n")
    with pytest.raises(SystemExit):
        tasks.main(["--data_dir", str(tmp_path), "--check", "CoLA"])
    captured = capsys.readouterr()
    assert "1 broken rows, the first: " in captured.out
    assert "CoLA test: CoLA: no test set" in captured.out
    assert captured.err == "error: 2 splits are missing or broken\n"
