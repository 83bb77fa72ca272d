"""The list of tasks, and the check of their files."""

from __future__ import annotations

import re
import shutil

import pytest

from data import survey
from data.tasks import task_names
from scripts import tasks
from tests.conftest import ROOT

TEST_DATA = str(ROOT / "test_data")


def test_every_task_is_listed_with_its_files(capsys):
    rows = tasks.main(["--data_dir", TEST_DATA])
    assert [row[0] for row in rows] == task_names()
    assert {row[-1] for row in rows} == {"all"}
    header, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):  # every column begins where its title does
        for title, cell in zip(survey.HEADER, row):
            assert line[header.index(f"  {title}") + 2 if title != "task" else 0 :].startswith(cell)
    mnli = rows[task_names().index("MNLI")]
    assert mnli[4].startswith("train 392,702, dev_matched 9,815, dev_mismatched 9,832, test_m")
    assert mnli[5] == f"{TEST_DATA}/glue/MNLI"


def test_absent_files_are_shown_where_they_are_looked_for(tmp_path):
    shutil.copytree(ROOT / "test_data/glue/CoLA", tmp_path / "CoLA")
    (tmp_path / "CoLA" / "test.tsv").unlink()
    rows = {row[0]: row for row in tasks.main(["--data_dir", str(tmp_path)])}
    assert rows["CoLA"][-2:] == [str(tmp_path / "CoLA"), "train, dev"]
    assert rows["CB"][-2:] == [str(tmp_path / "superglue" / "CB"), "none"]


def test_check_reads_every_split(capsys):
    rows = tasks.main(["--data_dir", TEST_DATA, "--check", "CoLA", "ReCoRD"])
    assert len(rows) == 6
    assert rows[0] == ["CoLA", "train", "8", "8,551", "yes", f"{TEST_DATA}/glue/CoLA/train.tsv"]
    assert rows[2][4] == "no"
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == [*survey.CHECK_HEADER]
    assert header.index("found") == first.index(TEST_DATA)


def test_check_names_what_is_missing_or_broken(capsys, tmp_path):
    shutil.copytree(ROOT / "test_data/glue/CoLA", tmp_path / "CoLA")
    (tmp_path / "CoLA" / "test.tsv").unlink()
    with open(tmp_path / "CoLA" / "dev.tsv", "a") as file:
        file.write("broken\n")
    with pytest.raises(SystemExit):
        tasks.main(["--data_dir", str(tmp_path), "--check", "CoLA"])
    captured = capsys.readouterr()
    assert f"CoLA/dev.tsv: 1 broken, the first: {tmp_path}/CoLA/dev.tsv:5: " in captured.out
    assert re.search(r"CoLA +test +- +1,063 +- +no test set", captured.out)
    assert captured.err == "error: 2 of 3 splits missing or broken\n"


def test_a_folder_that_does_not_exist_is_named(capsys, tmp_path):
    for flags in ([], ["--check", "CoLA"]):
        with pytest.raises(SystemExit):
            tasks.main(["--data_dir", str(tmp_path / "no"), *flags])
        assert capsys.readouterr().err == f"error: --data_dir {tmp_path / 'no'}: is not a folder\n"
